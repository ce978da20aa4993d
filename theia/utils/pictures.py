"""Features as pictures: PCA colours in a fixed basis, norm maps, and boards that put them side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Picture = npt.NDArray[np.uint8]  # (H, W, 3), RGB

# Colours span this part of the basis tokens' range; beyond it they saturate, so that outliers do not grey out the rest.
_RANGE_PERCENT = (1, 99)

# Norms that differ by less than this part of the highest are the same: behind a layer norm, its epsilon and rounding
# leave such differences, which must not fill all colours.
_SAME = 1e-4


@dataclass(frozen=True)
class ColourBasis:
    """Three principal axes, and the range of each that is mapped to 0..255.

    Attributes:
        mean: Mean token, shape ``(C,)``.
        axes: Orthonormal rows, shape ``(3, C)``; rows of zeros where there are fewer than three axes.
        low: Coordinates shown as 0, shape ``(3,)``.
        high: Coordinates shown as 255, shape ``(3,)``.
    """

    mean: Array
    axes: Array
    low: Array
    high: Array


def colour_basis(tokens: Array) -> ColourBasis:
    """Principal axes of a set of tokens, with scikit-learn's fixed signs.

    Args:
        tokens: Tokens, shape ``(S, C)``.

    Returns:
        A basis for :func:`pca_colours`. Features shown in one basis can be compared by eye.
    """
    from sklearn.decomposition import PCA

    tokens = np.asarray(tokens, np.float64)
    with np.errstate(invalid="ignore"):  # constant tokens have no variance to explain
        pca = PCA(n_components=min(3, *tokens.shape), svd_solver="full").fit(tokens)
    axes = np.zeros((3, tokens.shape[1]))
    axes[: len(pca.components_)] = pca.components_
    low, high = np.percentile((tokens - pca.mean_) @ axes.T, _RANGE_PERCENT, axis=0)
    return ColourBasis(pca.mean_, axes, low, high)


def pca_colours(patches: Array, grid_hw: tuple[int, int], basis: ColourBasis) -> Picture:
    """Shows each patch token as one pixel, coloured by its coordinates in a basis.

    Args:
        patches: Patch tokens, row by row, shape ``(N, C)``.
        grid_hw: Number of rows and columns of the grid, ``N = H * W``.
        basis: Basis for tokens of the same width ``C``.

    Returns:
        Picture of shape ``(H, W, 3)``.
    """
    coordinates = (np.asarray(patches, np.float64) - basis.mean) @ basis.axes.T
    span = np.where(basis.high > basis.low, basis.high - basis.low, 1)
    levels = np.clip((coordinates - basis.low) / span, 0, 1)
    return np.round(255 * levels).astype(np.uint8).reshape(*grid_hw, 3)


def is_constant(norms: Array) -> bool:
    """Whether norms are the same but for rounding and the epsilon of a normalisation; they are not negative."""
    return bool(np.ptp(norms) <= _SAME * norms.max())


def norm_map(patches: Array, grid_hw: tuple[int, int]) -> Picture:
    """Shows the L2 norms of patch tokens, from the lowest in the picture (dark) to the highest (bright).

    It is dark where :func:`is_constant` says that they are all the same.

    Args:
        patches: Patch tokens, row by row, shape ``(N, C)``.
        grid_hw: Number of rows and columns of the grid.

    Returns:
        Picture of shape ``(H, W, 3)``, in the viridis colour map.

    Source: Theia, section 5, figure 7.
    """
    from matplotlib import colormaps

    norms = np.linalg.norm(np.asarray(patches, np.float64), axis=1).reshape(grid_hw)
    levels = np.zeros(grid_hw) if is_constant(norms) else (norms - norms.min()) / np.ptp(norms)
    colours: Picture = np.round(255 * colormaps["viridis"](levels)[..., :3]).astype(np.uint8)
    return colours


def board(columns: Sequence[tuple[str, Sequence[Picture]]], title: str = "") -> Any:
    """Makes a figure with a titled column for each kind of picture and a row for each image.

    Args:
        columns: Title and pictures of each column, with equally many pictures in each.
        title: Title of the whole figure.

    Returns:
        A ``matplotlib.figure.Figure``; save it with ``savefig``.
    """
    from matplotlib.figure import Figure

    rows = len(columns[0][1])
    figure = Figure(figsize=(1.7 * len(columns), 1.7 * rows + 0.6), dpi=120, layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (heading, pictures) in enumerate(columns):
        axes[0, column].set_title(heading, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="nearest", aspect="equal", extent=(0, 1, 0, 1))
            axes[row, column].set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


_TELLS_NOTHING = ("", ".", "exported", "checkpoints", "last.ckpt")


_LINE = 20  # number of letters


def short_labels(names: Sequence[str]) -> dict[str, str]:
    """Shortens a path to its last two meaningful parts, keeps other names whole, and drops options in braces.

    Two names that would become the same both stay whole.
    """
    short = {}
    for name in names:
        # PREFIX:NAME@PATH, or PATH with what an encoder's name may add.
        kind, at, rest = name.partition("@") if re.match(r"\w+:", name) else ("", "", name)
        path = re.sub(r"(@random)?(@\d+)?$", "", rest)
        parts = [part for part in path.split("/") if part not in _TELLS_NOTHING] or [path]
        short[name] = kind + at + ("..." if path.startswith("{") else "/".join(parts[-2:])) + rest[len(path) :]
    labels = [*short.values()]
    return {name: label if labels.count(label) == 1 else name for name, label in short.items()}


def wrapped(label: str) -> str:
    """Breaks a label into lines of about twenty letters, after punctuation."""
    lines = [""]
    for piece in re.findall(r"[^:/@,_.-]*[:/@,_.-]?", label):
        if lines[-1] and len(lines[-1]) + len(piece) > _LINE:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
