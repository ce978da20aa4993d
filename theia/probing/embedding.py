"""Features of a frozen encoder, computed once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.encoder.from_name import NamedEncoder, open_encoder
from theia.errors import ConfigError, FeatureError
from theia.models.backbone import StudentTokens
from theia.probing.datasets import IMAGE_SIZE, Storage, fingerprint
from theia.utils.progress import Progress

_BATCH_SIZE = 16
_GREY = 128
_LOOKS = 4  # images by which an encoder is judged before the work


@dataclass(frozen=True)
class Features:
    """Features of all images of a split.

    Attributes:
        tokens: Patch tokens, float32, shape ``(n, N, C)``, in memory or mapped from a file.
        grid: Rows and columns of the tokens, ``N = H * W``.
    """

    tokens: NDArray[np.float32]
    grid: tuple[int, int]


def open_all(names: Sequence[str], device: torch.device, spatial: bool) -> list[NamedEncoder]:
    """Opens all encoders and tries each on one grey image, before any data are read.

    Args:
        names: Names of the encoders, as :func:`theia.encoder.from_name.open_encoder` takes them.
        device: Device to put them on.
        spatial: Whether more than one token is needed.

    Raises:
        ConfigError: If a name is there twice or names no encoder, or features have no grid.
        FeatureError: If features are not finite.
        TheiaError: If an encoder cannot be loaded, or does not take such images.
    """
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise ConfigError(f"--encoders names {twice[0]} twice. Name each once.")
    encoders = [open_encoder(name, device) for name in names]
    grey = np.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), _GREY, np.uint8)
    for encoder in encoders:
        _look(encoder, grey, spatial)
    return encoders


def check_encoders(encoders: Iterable[NamedEncoder], images: NDArray[np.uint8], spatial: bool) -> dict[str, str]:
    """Looks at the features of a few images of the data, before they are probed.

    Args:
        encoders: Encoders that are to be probed.
        images: Images, shape ``(n, 3, H, W)``; a few spread over all are looked at.
        spatial: Whether more than one token is needed.

    Returns:
        A fingerprint of each encoder's features, by its name; other weights give another one.

    Raises:
        ConfigError: If features have no grid, or are the same for all images.
        FeatureError: If they are not finite.
        TheiaError: If an encoder does not take such images.
    """
    places = np.unique(np.linspace(0, len(images) - 1, _LOOKS).round().astype(int))
    found = {}
    for encoder in encoders:
        tokens = _look(encoder, images[places], spatial)
        if len(places) > 1 and bool((tokens.patches == tokens.patches[:1]).all()):
            raise ConfigError(
                f"{encoder.name} gives the same features for {len(places)} images spread over the data: there is "
                "nothing to probe. Has its training collapsed, or are the images all the same?"
            )
        found[encoder.name] = fingerprint(encoder.name, tokens.grid, tokens.patches.cpu().numpy())
    return found


def token_features(encoder: NamedEncoder, images: NDArray[np.uint8], storage: Storage, what: str) -> Features:
    """Computes the patch tokens of all images.

    Args:
        encoder: The frozen encoder.
        images: Images, shape ``(n, 3, H, W)``.
        storage: Storage for the tokens.
        what: Text for the progress bar.

    Raises:
        FeatureError: If features are not finite.
    """
    grids: list[tuple[int, int]] = []

    def tokens_of(batch: Tensor) -> Tensor:
        tokens: StudentTokens = encoder(batch)
        grids.append(tokens.grid)
        return tokens.patches

    starts = range(0, len(images), _BATCH_SIZE)
    batches = (torch.from_numpy(images[start : start + _BATCH_SIZE]) for start in starts)
    return Features(_collect(encoder, tokens_of, batches, len(images), storage, what), grids[0])


def pooled_features(
    encoder: NamedEncoder, batches: Iterable[Tensor], count: int, storage: Storage, what: str
) -> NDArray[np.float32]:
    """Computes one vector per image, the mean of its patch tokens.

    Args:
        encoder: The frozen encoder.
        batches: Images, uint8 of shape ``(B, 3, H, W)``.
        count: Number of images.
        storage: Storage for the vectors.
        what: Text for the progress bar.

    Returns:
        Shape ``(count, C)``.

    Raises:
        FeatureError: If features are not finite.
    """
    return _collect(encoder, lambda batch: encoder(batch).patches.mean(1), batches, count, storage, what)


def _collect(
    encoder: NamedEncoder,
    function: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    count: int,
    storage: Storage,
    what: str,
) -> NDArray[Any]:
    device = _device_of(encoder)
    kept: NDArray[Any]
    done = 0
    with Progress(f"{encoder.name}: {what}", count) as progress:
        for batch in batches:
            found = function(batch.to(device))
            _check_finite(encoder, found)
            if not done:
                kept = storage.empty((count, *found.shape[1:]), np.float32)
            kept[done : done + len(found)] = found.cpu().numpy()
            done += len(found)
            progress.advance(len(found))
    return kept


def _look(encoder: NamedEncoder, images: NDArray[np.uint8], spatial: bool) -> StudentTokens:
    tokens: StudentTokens = encoder(torch.from_numpy(images).to(_device_of(encoder)))
    if spatial and tokens.patches.shape[1] < 2:
        raise ConfigError(f"{encoder.name} gives no spatial features, but one vector per image. Take another.")
    _check_finite(encoder, tokens.patches)
    return tokens


def _check_finite(encoder: NamedEncoder, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise FeatureError(f"{encoder.name} gives features that are not finite. Check its weights.")


def _device_of(encoder: NamedEncoder) -> torch.device:
    return next((tensor.device for tensor in [*encoder.parameters(), *encoder.buffers()]), torch.device("cpu"))
