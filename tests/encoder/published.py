"""A model in the published layout, made of transformers' ViT and of translators written out layer by layer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

CDIV = {
    "openai/clip-vit-large-patch14": (24, 16),
    "facebook/dinov2-large": (20, 16),
    "google/vit-huge-patch14-224-in21k": (28, 16),
}
CDDSV = {**CDIV, "facebook/sam-vit-huge": (12, 64), "LiheYoung/depth-anything-large-hf": (4, 64)}

_WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_LAYER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}


@dataclass
class Published:
    """The same model twice: in a folder, and as modules of others."""

    folder: Path
    vit: ViTModel
    heads: Mapping[str, nn.Module]

    def tokens(self, images: Tensor) -> Tensor:
        """CLS and patch tokens of uint8 images ``(B, 3, H, W)``, with their rule for positions at other sizes."""
        rows, columns = (side // 16 for side in images.shape[-2:])
        embeddings = self.vit.embeddings
        trained = embeddings.position_embeddings
        positions = trained.data
        if (rows, columns) != (14, 14):
            grid = positions[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2).contiguous()
            factors = ((rows + 0.1) / 14, (columns + 0.1) / 14)
            grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        pixels = images / 127.5 - 1
        patches = embeddings.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat([embeddings.cls_token.expand(len(images), -1, -1), patches], dim=1) + positions
        # transformers has renamed them since.
        layers = self.vit.layers if hasattr(self.vit, "layers") else self.vit.encoder.layer
        for layer in layers:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.vit.layernorm(hidden)


def write(
    folder: Path, size: str = "tiny", teachers: Mapping[str, tuple[int, int]] = CDIV, **config: object
) -> Published:
    """Writes a folder with random weights, norms and biases too."""
    torch.manual_seed(1)
    width, heads = _WIDTHS[size]
    vit = ViTModel(
        ViTConfig(
            hidden_size=width, num_hidden_layers=12, num_attention_heads=heads, intermediate_size=4 * width,
            layer_norm_eps=1e-12, hidden_act="gelu",
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    modules = {name: _head(width, channels, rows) for name, (channels, rows) in teachers.items()}
    for module in (vit, *modules.values()):
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.05)
    tensors = _rename_vit(vit.state_dict())
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            place = key.replace("pad.", "pad.1.")
            tensors[f"translator.translator_heads.{name}.{place}"] = value
    record = {
        "architectures": ["TheiaModel"],
        "backbone": f"facebook/deit-{size}-patch16-224",
        "feature_reduce_method": None,
        "image_size": 224,
        "num_reg_tokens": 0,
        "target_feature_sizes": {name: [channels, rows, rows] for name, (channels, rows) in teachers.items()},
        "translator_hidden_size_factor": 1.0,
        "translator_type": "lconv",
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(record))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return Published(folder, vit, modules)


class _Head(nn.Module):
    def __init__(self, pad: nn.Module, adapter: nn.Sequential) -> None:
        super().__init__()
        self.pad, self.adapter = pad, adapter

    def forward(self, maps: Tensor) -> Tensor:
        return self.adapter[8](self.adapter[:7](self.pad(maps)).flatten(2).transpose(1, 2))


def _head(width: int, channels: int, rows: int) -> nn.Module:
    if rows == 16:
        layers = [
            nn.LayerNorm([width, 16, 16]), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.LayerNorm([width, 16, 16]), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.LayerNorm([width, 16, 16]),
        ]  # fmt: skip
    else:
        layers = [
            nn.LayerNorm([width, 16, 16]), nn.ConvTranspose2d(width, width, 3, stride=2, padding=1), nn.ReLU(),
            nn.LayerNorm([width, 31, 31]), nn.ConvTranspose2d(width, width, 3, stride=2, output_padding=1), nn.ReLU(),
            nn.LayerNorm([width, 64, 64]),
        ]  # fmt: skip
    return _Head(nn.ConvTranspose2d(width, width, 3), nn.Sequential(*layers, nn.Flatten(2), nn.Linear(width, channels)))


def _rename_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            layer, _, kind = rest.rpartition(".")
            name = f"encoder.layer.{number}.{_LAYER[layer]}.{kind}"
        renamed[f"backbone.model.{name}"] = value
    return renamed
