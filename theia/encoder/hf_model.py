"""An encoder as a model of transformers: ``AutoModel.from_pretrained(FOLDER)`` after ``import theia``."""

from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel

from theia.encoder.encoder import Encoder, check_pool
from theia.encoder.hf_config import TheiaConfig
from theia.models import older
from theia.models.architecture import Architecture
from theia.models.scaler import FeatureScaler


class TheiaModel(PreTrainedModel):
    """An :class:`Encoder` that transformers can load, save and push to the hub."""

    config_class = TheiaConfig
    base_model_prefix = "theia"
    main_input_name = "pixel_values"
    # Statistics lose too much in any narrower type. transformers 4 takes no names of buffers here: with it, load in
    # float32 and convert afterwards, model.to(dtype).
    _keep_in_fp32_modules_strict = (
        {"scalers", "cls_scalers", "pixel_mean", "pixel_std"} if transformers.__version__ >= "5" else None
    )
    encoder: Encoder

    def __init__(self, config: TheiaConfig) -> None:
        super().__init__(config)
        # Not a submodule: only its distiller is one, so that the names in the file are those of a checkpoint.
        object.__setattr__(
            self, "encoder", Encoder(Architecture.of(config.architecture or {}), check_pool(config.pool))
        )
        self.distiller = self.encoder.distiller
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Loads as transformers does, then restores what no file holds, such as the frozen translators."""
        loaded = super().from_pretrained(*args, **{"key_mapping": older.KEY_MAPPING, **options})
        model: TheiaModel = loaded[0] if isinstance(loaded, tuple) else loaded  # with or without a loading report
        model.encoder.freeze_translators()
        for module in model.modules():
            if isinstance(module, FeatureScaler):
                module.refresh()
        return loaded

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Tokens of a batch of images.

        Args:
            pixel_values: Images as :class:`Encoder` takes them: uint8, or floating point from 0 to 1; not normalised.
            return_dict: Whether to give names to the results; ``False`` gives a plain tuple in the same order.

        Returns:
            ``last_hidden_state``: CLS, register and patch tokens in this order, shape ``(B, prefix + N, C)``;
            ``pooler_output``: shape ``(B, C)``.

        Raises:
            ShapeError: If the images have the wrong shape or size.
            ImageError: If their type or range is wrong.
        """
        tokens = self.encoder.forward_features(pixel_values)
        cls = [] if tokens.cls is None else [tokens.cls[:, None]]
        every = torch.cat([*cls, tokens.registers, tokens.patches], dim=1)
        pool = "mean" if self.encoder.pool == "none" else self.encoder.pool
        output = BaseModelOutputWithPooling(
            last_hidden_state=cast(Any, every), pooler_output=cast(Any, self.encoder.pooled(tokens, pool))
        )
        return output.to_tuple() if return_dict is False else output

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the file has every parameter."""


def register() -> None:
    """Registers the model with ``AutoModel``."""
    AutoModel.register(TheiaConfig, TheiaModel, exist_ok=True)
