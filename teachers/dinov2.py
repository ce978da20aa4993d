"""DINOv2, through transformers."""

from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor

from theia.errors import ConfigError
from theia.teacher import Teacher
from theia.types import TeacherFeatures, TeacherSpec

from ._huggingface import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, load

_PREPROCESSING = Preprocessing(size=224, interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD)
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
}
Crop = Literal["whole", "authors"]


class DINOv2(Teacher):
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
            crop: "whole" shows the teacher what the student sees; "authors" is the centre 7/8 of each side,
                as in the published Theia models.

        Raises:
            ConfigError: If the options do not fit together.
            WeightsError: If the weights cannot be had or do not fit.
        """
        super().__init__()
        if crop not in get_args(Crop):
            raise ConfigError(f"Teacher {self.spec.name!r}: crop {crop!r} is not one of {', '.join(get_args(Crop))}.")
        from transformers import Dinov2Config, Dinov2Model

        self.model, found = load(
            self.spec.name,
            Dinov2Model,
            model_types=("dinov2",),
            weights=weights,
            revision=revision,
            architecture=architecture,
            build_config=Dinov2Config,
            sizes=_LARGE,
        )
        config = self.model.config
        if size <= 0 or size % config.patch_size:
            raise ConfigError(
                f"Teacher {self.spec.name!r}: size {size} is not a multiple of its patch, "
                f"{config.patch_size} pixels. Correct --{self.spec.name}.size."
            )
        # The authors resize the short edge to 256 for an input of 224.
        short_edge = size * 8 // 7 if crop == "authors" else None
        self.preprocess = replace(_PREPROCESSING, size=size, short_edge=short_edge)
        self.spec = replace(
            self.spec,
            channels=config.hidden_size,
            grid_hw=(size // config.patch_size,) * 2,
            weights=weights,
            revision=found,
            preprocessing=self.preprocess.record(),
        )

    def forward(self, images: Tensor) -> TeacherFeatures:
        """See :meth:`theia.teacher.Teacher.forward`."""
        tokens = self.model(pixel_values=self.preprocess(images)).last_hidden_state
        return TeacherFeatures(patches=tokens[:, 1:], cls=tokens[:, 0])
