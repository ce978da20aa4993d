"""Norm maps: where in an image the long tokens lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from theia.utils.pictures import Picture, is_constant, norm_map, wrapped

Norms = npt.NDArray[np.float64]  # (H, W)


@dataclass
class NormMaps:
    """The images that are shown, and the norms of each encoder's patch tokens on them.

    Attributes:
        images: Pictures by sample id.
        norms: Maps by encoder, one per image in the same order.
    """

    images: dict[str, Picture] = field(default_factory=dict)
    norms: dict[str, list[Norms]] = field(default_factory=dict)

    def add_image(self, sample_id: str, image: Tensor) -> None:
        """Adds an image, whose norms must then be added for every encoder.

        Args:
            sample_id: Sample id of the image.
            image: RGB, uint8, shape ``(3, H, W)``.
        """
        self.images[sample_id] = image.permute(1, 2, 0).cpu().numpy()

    def add_norms(self, encoder: str, norms: Tensor, grid: tuple[int, int]) -> None:
        """Adds the norms of one image's tokens.

        Args:
            encoder: Name of the encoder.
            norms: Norms of the tokens, shape ``(N,)``, row by row.
            grid: Rows and columns, ``N = H * W``.
        """
        self.norms.setdefault(encoder, []).append(norms.double().cpu().numpy().reshape(grid))


def plain(norms: Norms) -> Picture:
    """A norm map from the image's lowest (dark) to its highest (bright); dark where all are the same."""
    return _picture(norms, norms)


def clipped(norms: Norms) -> Picture:
    """A norm map clipped at its median: what the highest norms outshine in the plain one, spread over all colours.

    Source: Theia, figures 7, 12 and 13.
    """
    return _picture(norms, np.minimum(norms, np.median(norms)))


def board(maps: NormMaps, labels: Mapping[str, str]) -> Any:
    """All norm maps side by side: a column per image, and below it two rows per encoder, plain and clipped.

    Args:
        maps: Maps of at least one image.
        labels: What to call each encoder, by name.

    Returns:
        A ``matplotlib.figure.Figure``; save it with ``savefig``.
    """
    from matplotlib.figure import Figure

    rows: list[tuple[str, Sequence[Picture], Sequence[str]]] = [("image", [*maps.images.values()], ())]
    for encoder, norms in maps.norms.items():
        ranges = [_range(one) for one in norms]
        constant = "\n(constant)" if all(map(is_constant, norms)) else ""
        rows.append((wrapped(labels[encoder]) + constant, [plain(one) for one in norms], ranges))
        rows.append(("clipped at\nits median", [clipped(one) for one in norms], ()))
    size = (1.4 + 1.3 * len(maps.images), 1.37 * len(rows) + 0.1)
    figure = Figure(figsize=size, dpi=120, layout="compressed")
    axes = figure.subplots(len(rows), len(maps.images), squeeze=False)
    for row, (heading, pictures, below) in enumerate(rows):
        for panel, picture in zip(axes[row], pictures, strict=True):
            panel.imshow(picture, interpolation="nearest", aspect="equal", extent=(0, 1, 0, 1))
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
        for panel, text in zip(axes[row], below, strict=False):
            panel.set_xlabel(text, fontsize=6.5, labelpad=2)
        axes[row, 0].set_ylabel(heading, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _picture(norms: Norms, shown: Norms) -> Picture:
    return norm_map((shown * (not is_constant(norms))).reshape(-1, 1), (norms.shape[0], norms.shape[1]))


def _range(norms: Norms) -> str:
    if is_constant(norms):
        return f"constant: {norms.mean():.3g}"
    digits = ".3g" if np.ptp(norms) > 0.01 * norms.max() else ".6g"
    return f"{norms.min():{digits}} to {norms.max():{digits}}"
