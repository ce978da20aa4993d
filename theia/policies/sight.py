"""What a policy sees through: an encoder whose tokens are given as a map or as one vector."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from theia.encoder.encoder import Encoder
from theia.encoder.from_name import open_encoder
from theia.errors import ConfigError
from theia.models.backbone import StudentTokens, resized
from theia.probing.frame_tokens import pixel_means

PIXELS = "pixels"

Features = Literal["spatial", "vector", "cls", "mean", "max"]


class Sight(nn.Module):
    """Pictures to tokens. Frozen and in evaluation mode, unless somebody unfreezes it.

    Args:
        name: Name of the encoder, as the user gave it.
        model: A Theia model, or another one that gives :class:`~theia.models.backbone.StudentTokens`; ``None`` for
            16x16 mean colours.
        features: ``spatial`` for patch tokens; ``cls``, ``mean`` or ``max`` for the CLS token or patch tokens pooled;
            ``vector`` for the CLS token, or else the mean of the patch tokens.
        size: Height and width in pixels to which a Theia model's pictures are resized; ``None`` leaves them alone.

    Raises:
        ConfigError: If there are no such features.
    """

    def __init__(
        self, name: str, model: nn.Module | None, features: Features = "spatial", size: int | None = None
    ) -> None:
        super().__init__()
        if features not in get_args(Features):
            raise ConfigError(f"There are no features {features!r}. Choose one of: {', '.join(get_args(Features))}.")
        self.name, self.model, self.features, self.size = name, model, features, size
        self.eval().requires_grad_(False)

    @property
    def encoder(self) -> Encoder | None:
        """The Theia model behind it, if it is one: only that can be fine-tuned, and saved with a policy."""
        return self.model if isinstance(self.model, Encoder) else None

    def forward(self, images: Tensor) -> StudentTokens:
        """Tokens of images; those of a vector are one, with a grid of 1x1.

        Args:
            images: RGB images, uint8, shape ``(B, 3, H, W)``.

        Raises:
            ConfigError: If the CLS token is wanted, and there is none.
        """
        if self.model is None:
            tokens = pixel_means(images)
        elif self.encoder is not None:
            tokens = self.encoder.forward_features(resized(images, self.size))
        else:
            tokens = self.model(images)
        if self.features == "spatial":
            return tokens
        if self.features == "cls" and tokens.cls is None:
            raise ConfigError(f"{self.name} has no CLS token. Take --features vector, mean or max.")
        if self.features == "max":
            vector = tokens.patches.amax(1)
        elif self.features == "mean" or tokens.cls is None:
            vector = tokens.patches.mean(1)
        else:
            vector = tokens.cls
        return StudentTokens(None, tokens.patches[:, :0], vector[:, None], (1, 1))


def open_sight(
    name: str,
    features: Features,
    device: str | torch.device = "cpu",
    controls: Mapping[str, str] = MappingProxyType({}),
) -> Sight:
    """Opens an encoder by its name.

    Args:
        name: Name in one of the forms of :data:`theia.encoder.FORMS`, or ``pixels`` for 16x16 mean colours.
        features: See :class:`Sight`.
        device: Device of the encoder.
        controls: See :func:`theia.encoder.from_name.open_encoder`.

    Raises:
        ConfigError: If the name names nothing.
        WeightsError: If weights cannot be loaded.
    """
    if name == PIXELS:
        return Sight(name, None, features)
    opened = open_encoder(name, controls=controls)
    model = opened.source if isinstance(opened.source, Encoder) else opened
    return Sight(name, model, features, opened.size).to(device)


@torch.no_grad()
def features_of_noise(sight: Sight, image_size: int) -> tuple[StudentTokens, list[float]]:
    """What an encoder gives for one picture of noise, by which its weights can be told again.

    Args:
        sight: The encoder.
        image_size: Height and width of the picture, in pixels.

    Returns:
        The tokens, and the mean of each channel over them.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    parameter = next(sight.parameters(), noise)
    tokens = sight(noise.to(parameter.device))
    return tokens, tokens.patches.float().mean((0, 1)).tolist()
