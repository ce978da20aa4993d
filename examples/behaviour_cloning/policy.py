"""A policy: an encoder, and one of the paper's two heads."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theia import Encoder
from theia.errors import ConfigError, ShapeError
from theia.models.architecture import Architecture

HIDDEN = 256  # channels of the convolutions, and units of both hidden layers of the MLP
SMALLEST_GRID = 14  # what three convolutions without padding at the end leave one cell of

Features = Literal["spatial", "cls", "mean", "max"]


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """What decides the parameters of a policy beside its encoder.

    The paper prints neither norm. The authors' code has both, and scores could not be reproduced without them, so
    both are on by default.

    Attributes:
        actions: Values of an action.
        proprioception: Values of the robot's own state; 0 for images alone.
        features: ``"spatial"`` for the patch tokens through convolutions, as the paper's main results; a pooling of
            the encoder (``"mean"``, ``"max"``, ``"cls"``) for a vector. Nothing supervises the CLS token in training,
            unless it was distilled.
        conv_norm: A layer norm over channels and places after each convolution.
        input_norm: A batch norm in front of the MLP.
        image_size: Pixels along each side that images are resized to; the encoder's own by default.
    """

    actions: int
    proprioception: int = 0
    features: Features = "spatial"
    conv_norm: bool = True
    input_norm: bool = True
    image_size: int | None = None


class SpatialReduction(nn.Sequential):
    """Three convolutions that make a vector of a feature map.

    ``Conv(C, 256, 4, stride 2, padding 1)``, ``Conv(256, 256, 3, stride 2)``, ``Conv(256, 256, 3)``, each with ReLU:
    a grid of 14x14 becomes 7x7, 3x3 and one cell.

    Args:
        channels: ``C`` of the map.
        grid: Its rows and columns.
        norm: Layer norms between convolution and ReLU.

    Raises:
        ShapeError: If the grid is too small.

    Source: Theia, appendix on the policy heads.
    """

    def __init__(self, channels: int, grid: tuple[int, int], norm: bool) -> None:
        if min(grid) < SMALLEST_GRID:
            raise ShapeError(
                f"The spatial head needs at least {SMALLEST_GRID}x{SMALLEST_GRID} patch tokens; this encoder gives "
                f"{grid[0]}x{grid[1]}. Use larger images (image_size 224), or features 'mean'."
            )
        layers: list[nn.Module] = []
        for kernel, stride, padding in ((4, 2, 1), (3, 2, 0), (3, 1, 0)):
            layers.append(nn.Conv2d(channels, HIDDEN, kernel, stride, padding))
            grid = ((grid[0] + 2 * padding - kernel) // stride + 1, (grid[1] + 2 * padding - kernel) // stride + 1)
            layers += [nn.LayerNorm((HIDDEN, *grid)), nn.ReLU()] if norm else [nn.ReLU()]
            channels = HIDDEN
        super().__init__(*layers, nn.Flatten())
        self.outputs = HIDDEN * grid[0] * grid[1]


class Policy(nn.Module):
    """Images, and optionally proprioception, to actions.

    Actions and proprioception are in their own units; :meth:`set_statistics` gives the policy their scale.

    Args:
        encoder: As it shall be trained: frozen, or with some blocks free. The policy does not change that.
        options: See :class:`PolicyOptions`.

    Raises:
        ConfigError: If an option is unknown.
        ShapeError: If the image size is no multiple of the patch, or too small for the spatial head.
    """

    action_mean: Tensor  # (A,)
    action_std: Tensor  # (A,)
    proprioception_mean: Tensor  # (P,)
    proprioception_std: Tensor  # (P,)

    def __init__(self, encoder: Encoder, options: PolicyOptions) -> None:
        super().__init__()
        if options.features not in get_args(Features):
            known = ", ".join(get_args(Features))
            raise ConfigError(f"There are no features {options.features!r}. Choose one of: {known}.")
        self.encoder = encoder
        self.options = options
        self.image_size = options.image_size or encoder.image_size
        self.reduction: nn.Module = nn.Identity()
        inputs = encoder.width
        if options.features == "spatial":
            with torch.no_grad():
                blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
                grid = encoder.forward_features(blank).grid
            self.reduction = reduction = SpatialReduction(encoder.width, grid, options.conv_norm)
            inputs = reduction.outputs
        inputs += options.proprioception
        self.mlp = nn.Sequential(
            nn.BatchNorm1d(inputs) if options.input_norm else nn.Identity(),
            nn.Linear(inputs, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, options.actions),
        )
        for name, size in (("action", options.actions), ("proprioception", options.proprioception)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def set_statistics(self, actions: Tensor, proprioception: Tensor | None) -> None:
        """Takes the scale of actions and proprioception from training data.

        Args:
            actions: Shape ``(T, A)``.
            proprioception: Shape ``(T, P)``, if the policy uses it.
        """
        given = {"action": actions} if proprioception is None else {"action": actions, "proprioception": proprioception}
        for name, values in given.items():
            std = values.std(0, correction=0)
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            # A value that never changes must not be divided by nothing.
            getattr(self, f"{name}_std").copy_(torch.where(std > 0, std, 1.0))

    def encode(self, images: Tensor) -> Tensor:
        """What the encoder gives for images of any size; worth keeping where the encoder is frozen.

        Args:
            images: RGB, uint8, shape ``(B, H, W, 3)``.

        Returns:
            Shape ``(B, C, rows, columns)`` for spatial features, else ``(B, C)``.
        """
        channels_first = images.to(self.action_mean.device).permute(0, 3, 1, 2)
        if channels_first.shape[-2:] != (self.image_size, self.image_size):
            resized = F.interpolate(channels_first.float(), (self.image_size,) * 2, mode="bilinear", antialias=True)
            channels_first = resized.round().clamp(0, 255).to(torch.uint8)
        if self.options.features == "spatial":
            return self.encoder.forward_features(channels_first).as_map()
        features: Tensor = self.encoder(channels_first, pool=self.options.features)
        return features

    def act(self, features: Tensor, proprioception: Tensor | None = None) -> Tensor:
        """Actions in the units of the demonstrations, shape ``(B, A)``.

        Args:
            features: What :meth:`encode` gave.
            proprioception: Shape ``(B, P)``, if the policy was built with it.

        Raises:
            ShapeError: If proprioception is missing, or of another shape.
        """
        wanted = self.options.proprioception
        given = 0 if proprioception is None else proprioception.shape[-1]
        if given != wanted:
            raise ShapeError(f"Proprioception of {given} values; this policy was built for {wanted}.")
        vector = self.reduction(features)
        if proprioception is not None:
            scaled = (proprioception - self.proprioception_mean) / self.proprioception_std
            vector = torch.cat([vector, scaled], dim=1)
        actions: Tensor = self.mlp(vector) * self.action_std + self.action_mean
        return actions

    def forward(self, images: Tensor, proprioception: Tensor | None = None) -> Tensor:
        """Actions for images, shape ``(B, A)``: :meth:`encode`, then :meth:`act`."""
        return self.act(self.encode(images), proprioception)

    def checkpoint(self) -> dict[str, Any]:
        """Plain values and tensors, from which :meth:`restore` makes the policy again without the encoder's files."""
        return {
            "architecture": self.encoder.architecture.as_dict(),
            "options": asdict(self.options),
            "state_dict": self.state_dict(),
        }

    @classmethod
    def restore(cls, checkpoint: Mapping[str, Any]) -> "Policy":
        """A policy as it was saved, ready to act.

        Args:
            checkpoint: What :meth:`checkpoint` gave.
        """
        policy = cls(Encoder(Architecture.of(checkpoint["architecture"])), PolicyOptions(**checkpoint["options"]))
        policy.load_state_dict(checkpoint["state_dict"])
        return policy.eval()
