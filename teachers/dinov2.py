"""DINOv2, through transformers."""

from typing import Literal, get_args

from theia.errors import ConfigError
from theia.types import TeacherSpec

from ._huggingface import IMAGENET_MEAN, IMAGENET_STD, HuggingFaceTeacher, Preprocessing

_PREPROCESSING = Preprocessing(size=224, interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD)
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
}
Crop = Literal["whole", "authors"]


class DINOv2(HuggingFaceTeacher):
    """Patch tokens and CLS after the final layer norm.

    Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2024.
    """

    spec = TeacherSpec(
        name="dinov2",
        channels=1024,
        grid_hw=(16, 16),
        licence="Apache-2.0",
        weights="facebook/dinov2-large",
        has_cls=True,
        preprocessing=_PREPROCESSING.record(),
    )

    def __init__(
        self,
        weights: str = "facebook/dinov2-large",
        revision: str | None = None,
        architecture: dict[str, int] | None = None,
        size: int = 224,
        crop: Crop = "whole",
    ) -> None:
        """Loads the transformer.

        Args:
            weights: Hub id, local folder in the upstream format, or "random".
            revision: Branch, tag or commit on the hub; the newest by default.
            architecture: Sizes that differ from ViT-L/14, for random weights: hidden_size, num_hidden_layers,
                num_attention_heads, image_size (of the position embedding's table), patch_size.
            size: Side of the input in pixels, a multiple of the patch; position embeddings are interpolated.
            crop: Part of the image that the teacher sees: "whole", as the student does, or "authors", the centre 7/8 of
                each side, as for the published Theia models.

        Raises:
            ConfigError: If the options do not fit together.
            WeightsError: If the weights cannot be loaded or do not fit.
        """
        super().__init__()
        if crop not in get_args(Crop):
            raise ConfigError(f"Teacher {self.spec.name!r}: crop {crop!r} is not one of {', '.join(get_args(Crop))}.")
        from transformers import Dinov2Config, Dinov2Model

        self.load(
            Dinov2Model,
            model_types=("dinov2",),
            weights=weights,
            preprocess=_PREPROCESSING,
            revision=revision,
            architecture=architecture,
            build_config=Dinov2Config,
            sizes=_LARGE,
        )
        patch = self.model.config.patch_size
        if size <= 0 or size % patch:
            raise ConfigError(
                f"Teacher {self.spec.name!r}: size {size} is not a multiple of its patch, "
                f"{patch} pixels. Correct --{self.spec.name}.size."
            )
        # The authors resize the short edge to 256 for an input of 224.
        self.take_squares(size, size * 8 // 7 if crop == "authors" else None)
