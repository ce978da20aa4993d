"""ViT-H of ImageNet-21k, through transformers."""

from theia.types import TeacherSpec

from ._huggingface import HuggingFaceTeacher, Preprocessing

_PREPROCESSING = Preprocessing(size=224, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_HUGE = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


class ViT(HuggingFaceTeacher):
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
            WeightsError: If the weights cannot be loaded or do not fit.
        """
        super().__init__()
        from transformers import ViTConfig, ViTModel

        self.load(
            ViTModel,
            model_types=("vit",),
            weights=weights,
            preprocess=_PREPROCESSING,
            revision=revision,
            architecture=architecture,
            build_config=ViTConfig,
            sizes=_HUGE,
            add_pooling_layer=False,
        )
        self.take_squares(self.model.config.image_size)
