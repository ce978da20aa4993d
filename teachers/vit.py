"""ViT-H of ImageNet-21k, through transformers."""

from dataclasses import replace

from torch import Tensor

from theia.teacher import Teacher
from theia.types import TeacherFeatures, TeacherSpec

from ._huggingface import Preprocessing, load

_PREPROCESSING = Preprocessing(size=224, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_HUGE = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


class ViT(Teacher):
    """Patch tokens and CLS after the final layer norm.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021.
    """

    spec = TeacherSpec(
        name="vit",
        channels=1280,
        grid_hw=(16, 16),
        licence="Apache-2.0",
        weights="google/vit-huge-patch14-224-in21k",
        has_cls=True,
        preprocessing=_PREPROCESSING.record(),
    )

    def __init__(
        self,
        weights: str = "google/vit-huge-patch14-224-in21k",
        revision: str | None = None,
        architecture: dict[str, int] | None = None,
    ) -> None:
        """Loads the transformer, without pooler and classifier.

        Args:
            weights: Hub id, local folder in the upstream format, or "random".
            revision: Branch, tag or commit on the hub; the newest by default.
            architecture: Sizes that differ from ViT-H/14, for random weights: hidden_size, intermediate_size,
                num_hidden_layers, num_attention_heads, image_size, patch_size.

        Raises:
            ConfigError: If the options do not fit together.
            WeightsError: If the weights cannot be had or do not fit.
        """
        super().__init__()
        from transformers import ViTConfig, ViTModel

        self.model, found = load(
            self.spec.name,
            ViTModel,
            model_types=("vit",),
            weights=weights,
            revision=revision,
            architecture=architecture,
            build_config=ViTConfig,
            sizes=_HUGE,
            add_pooling_layer=False,
        )
        config = self.model.config
        self.preprocess = replace(_PREPROCESSING, size=config.image_size)
        self.spec = replace(
            self.spec,
            channels=config.hidden_size,
            grid_hw=(config.image_size // config.patch_size,) * 2,
            weights=weights,
            revision=found,
            preprocessing=self.preprocess.record(),
        )

    def forward(self, images: Tensor) -> TeacherFeatures:
        """See :meth:`theia.teacher.Teacher.forward`."""
        tokens = self.model(pixel_values=self.preprocess(images)).last_hidden_state
        return TeacherFeatures(patches=tokens[:, 1:], cls=tokens[:, 0])
