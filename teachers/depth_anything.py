"""Depth Anything, through transformers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from theia.errors import ConfigError
from theia.types import Depth, TeacherFeatures, TeacherSpec

from ._huggingface import IMAGENET_MEAN, IMAGENET_STD, HuggingFaceTeacher, Preprocessing

_PREPROCESSING = Preprocessing(size=518, interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD)
_GRID = 64
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "fusion_hidden_size": 256,
    "head_hidden_size": 32,
}


class DepthAnything(HuggingFaceTeacher):
    """Output of the head's second convolution at 518x518, before its ReLU, at 64x64 points.

    Source: Yang et al., "Depth Anything: Unleashing the Power of Large-Scale Unlabeled Data", 2024.
    """

    spec = TeacherSpec(
        name="depth_anything",
        channels=32,
        grid_hw=(_GRID, _GRID),
        licence="Apache-2.0",
        weights="LiheYoung/depth-anything-large-hf",
        preprocessing=_PREPROCESSING.record(),
    )

    def __init__(
        self,
        weights: str = "LiheYoung/depth-anything-large-hf",
        revision: str | None = None,
        architecture: dict[str, int] | None = None,
    ) -> None:
        """Loads backbone, neck and head.

        Args:
            weights: Hub id, local folder in the upstream format, or "random".
            revision: Branch, tag or commit on the hub; the newest by default.
            architecture: Sizes that differ from the large model, for random weights: hidden_size,
                num_hidden_layers and num_attention_heads of the backbone, fusion_hidden_size,
                head_hidden_size.

        Raises:
            ConfigError: If the options do not fit together.
            WeightsError: If the weights cannot be loaded or do not fit.
        """
        super().__init__()
        from transformers import DepthAnythingForDepthEstimation

        self.load(
            DepthAnythingForDepthEstimation,
            model_types=("depth_anything",),
            weights=weights,
            preprocess=_PREPROCESSING,
            revision=revision,
            architecture=architecture,
            build_config=_config,
            sizes=_LARGE,
        )
        self.spec = replace(self.spec, channels=self.model.config.head_hidden_size)

    def forward(self, images: Tensor) -> TeacherFeatures:
        """See :meth:`theia.teacher.Teacher.forward`."""
        pixels = self.preprocess(images)
        head = self.model.head
        side = pixels.shape[-1] // head.patch_size
        # The model's own forward goes on to depth; these are its first steps, in its order.
        stages = self.model.backbone(pixels).feature_maps
        fused = self.model.neck(stages, side, side)[head.head_in_index]
        resolution = (side * head.patch_size,) * 2
        upsampled = functional.interpolate(head.conv1(fused), resolution, mode="bilinear", align_corners=True)
        sampled = functional.interpolate(head.conv2(upsampled), (_GRID, _GRID), mode="nearest")
        return TeacherFeatures(patches=sampled.flatten(2).transpose(1, 2))

    def decode(self, patches: Tensor, images: Tensor) -> Depth:
        """Relative inverse depth, larger is nearer, 518x518. See :meth:`theia.teacher.Teacher.decode`.

        The features hold 64x64 of the 518x518 points; those between are interpolated, so that depth is as coarse.
        """
        points = patches.transpose(1, 2).reshape(*patches.shape[::2], _GRID, _GRID)
        side = self.preprocess.size
        # Point i was taken at pixel i * side / 64. With one more point than there are, corner to corner is that scale.
        padded = functional.pad(points, (0, 1, 0, 1), mode="replicate")
        pixels = functional.interpolate(padded, (side + 1, side + 1), mode="bilinear", align_corners=True)
        return Depth(self.depth(pixels[..., :side, :side]))

    def depth(self, features: Tensor) -> Tensor:
        """Runs the rest of the head, at any resolution; at the model's own, the result is exactly its prediction.

        Args:
            features: Output of the second convolution, shape ``(B, C, H, W)``.

        Returns:
            Depth maps, shape ``(B, H, W)``.
        """
        head = self.model.head
        depth = head.activation2(head.conv3(head.activation1(features))) * head.max_depth
        return torch.as_tensor(depth.squeeze(1))


def _config(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    fusion_hidden_size: int,
    head_hidden_size: int,
) -> Any:
    """The large model's config at other sizes: its neck reads the last four blocks and is as wide as they."""
    from transformers import DepthAnythingConfig, Dinov2Config

    if num_hidden_layers < 4 or hidden_size % 4:
        raise ConfigError(
            "Teacher 'depth_anything': 'architecture' needs at least 4 num_hidden_layers (the neck reads the "
            f"last four) and a hidden_size that is a multiple of 4; got {num_hidden_layers} and {hidden_size}."
        )
    backbone: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "image_size": _PREPROCESSING.size,
        "patch_size": 14,
        "out_indices": [num_hidden_layers - 3 + index for index in range(4)],
        "reshape_hidden_states": False,
    }
    return DepthAnythingConfig(
        backbone_config=Dinov2Config(**backbone),
        reassemble_hidden_size=hidden_size,
        neck_hidden_sizes=[hidden_size // 4, hidden_size // 2, hidden_size, hidden_size],
        fusion_hidden_size=fusion_hidden_size,
        head_hidden_size=head_hidden_size,
        patch_size=14,
    )
