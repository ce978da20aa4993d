"""The published recipe in straightforward PyTorch: what the training step is measured against.

float32, translators in NCHW, the images through the transformers image processor inside the step, every target
normalised to a float32 tensor first, cosine, smooth-L1 and squared error each computed on its own and read with
``.item()`` in every step, AdamW with its defaults. The student's transformer is timm's own.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from transformers import ViTImageProcessor

from theia.models.cpu_layers import CpuAttention, CpuMlp
from theia.models.distiller import Distiller


class PlainDistiller(nn.Module):
    """Student and translators as published, with the weights and statistics of one of ours.

    Args:
        ours: Distiller whose sizes, weights and statistics to copy, for images of 224 pixels and grids of 16x16 and
            64x64.
    """

    def __init__(self, ours: Distiller) -> None:
        super().__init__()
        self.processor = ViTImageProcessor(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        self.vit = copy.deepcopy(ours.student.backbone.model)
        for module in self.vit.modules():
            if isinstance(module, CpuAttention):
                module.__class__ = Attention  # type: ignore[assignment]
            elif isinstance(module, CpuMlp):
                module.__class__ = Mlp  # type: ignore[assignment]
        self.heads = nn.ModuleDict()
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}
        for name in ours.teachers:
            state = ours.translators[name].state_dict()
            head = _Head(ours.student.width, len(state["adapter.8.bias"]), state["adapter.6.weight"].shape[1])
            head.load_state_dict(state)
            self.heads[name] = head
            scaler = ours.scalers[name].state_dict()
            self.statistics[name] = (scaler["mean"], scaler["std"])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predictions ``(B, N, C)`` by teacher, of uint8 images ``(B, 3, 224, 224)``."""
        pixels = self.processor(images, return_tensors="pt", device=images.device)["pixel_values"]
        tokens = self.vit.forward_features(pixels)[:, self.vit.num_prefix_tokens :]
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, 14, 14)
        return {name: head(maps) for name, head in self.heads.items()}

    def loss(self, images: Tensor, patches: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch with raw features ``(B, N, C)`` by teacher, and each term of each teacher as a number."""
        return self.loss_of(self(images), patches)

    def loss_of(
        self, predictions: Mapping[str, Tensor], patches: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of predictions instead of images, and each term of each teacher as a number."""
        terms: dict[str, float] = {}
        losses = []
        for name, prediction in predictions.items():
            mean, std = self.statistics[name]
            target = (patches[name].float() - mean) / std
            cosine = 1 - F.cosine_similarity(prediction.flatten(1), target.flatten(1)).mean()
            smooth_l1 = F.smooth_l1_loss(prediction, target)
            mse = F.mse_loss(prediction, target)
            terms |= {f"{name}/cosine": cosine.item(), f"{name}/smooth_l1": smooth_l1.item(), f"{name}/mse": mse.item()}
            losses.append(0.9 * cosine + 0.1 * smooth_l1)
        return torch.stack(losses).mean(), terms


class _Head(nn.Module):
    """A published translator: to 16x16 (``pad``), two convolutions between joint layer norms, linear (``adapter``)."""

    def __init__(self, width: int, channels: int, rows: int) -> None:
        super().__init__()
        self.pad = nn.ConvTranspose2d(width, width, 3)
        first: nn.Module = nn.Conv2d(width, width, 3, padding=1)
        second: nn.Module = nn.Conv2d(width, width, 3, padding=1)
        middle = 16
        if rows == 64:
            first = nn.ConvTranspose2d(width, width, 3, stride=2, padding=1)
            second = nn.ConvTranspose2d(width, width, 3, stride=2, output_padding=1)
            middle = 31
        self.adapter = nn.Sequential(
            nn.LayerNorm([width, 16, 16]),
            first,
            nn.ReLU(),
            nn.LayerNorm([width, middle, middle]),
            second,
            nn.ReLU(),
            nn.LayerNorm([width, rows, rows]),
            nn.Flatten(2),
            nn.Linear(width, channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.adapter[:8](self.pad(maps)).transpose(1, 2)
        prediction: Tensor = self.adapter[8](tokens)
        return prediction
