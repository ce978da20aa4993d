"""CLIP's image tower, through transformers."""

from theia.types import TeacherSpec

from ._huggingface import HuggingFaceTeacher, Preprocessing

_PREPROCESSING = Preprocessing(
    size=224,
    interpolation="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


class CLIP(HuggingFaceTeacher):
    """Patch tokens and CLS of the last block, before the final layer norm.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
    """

    spec = TeacherSpec(
        name="clip",
        channels=1024,
        grid_hw=(16, 16),
        licence="MIT",
        weights="openai/clip-vit-large-patch14",
        has_cls=True,
        preprocessing=_PREPROCESSING.record(),
    )

    def __init__(
        self,
        weights: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        architecture: dict[str, int] | None = None,
    ) -> None:
        """Loads the vision tower; a checkpoint of the whole CLIP works too.

        Args:
            weights: Hub id, local folder in the upstream format, or "random".
            revision: Branch, tag or commit on the hub; the newest by default.
            architecture: Sizes that differ from ViT-L/14, for random weights: hidden_size, intermediate_size,
                num_hidden_layers, num_attention_heads, image_size, patch_size.

        Raises:
            ConfigError: If the options do not fit together.
            WeightsError: If the weights cannot be loaded or do not fit.
        """
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.load(
            CLIPVisionModel,
            model_types=("clip", "clip_vision_model"),
            weights=weights,
            preprocess=_PREPROCESSING,
            revision=revision,
            architecture=architecture,
            build_config=CLIPVisionConfig,
            sizes=_LARGE,
        )
        self.take_squares(self.model.config.image_size)
