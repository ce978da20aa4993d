"""What a teacher shows, as pictures whose colours mean the same in all images of a call."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from theia.types import Decoded, Depth, Masks, Pictures
from theia.utils.pictures import Array, ColourBasis, Picture, colour_basis, pca_colours

Bools = npt.NDArray[np.bool_]

_BASIS_TOKENS = 16_384  # more do not change three axes, and take long
_RANGE_PERCENT = (1, 99)
_IMAGE_SHARE = 0.35  # how much of the image is seen below masks


@dataclass(frozen=True)
class Tokens:
    """Features that are shown as colours of their principal components.

    Attributes:
        patches: Features, shape ``(1, N, C)``.
        grid_hw: Rows and columns, ``N = H * W``.
    """

    patches: Tensor
    grid_hw: tuple[int, int]


# What there is to show of one image.
Shown = Decoded | Tokens


@dataclass(frozen=True)
class Colours:
    """What colours stand for.

    Attributes:
        basis: Axes that the colours of tokens stand for.
        depth: Lowest and highest depth.
    """

    basis: ColourBasis | None = None
    depth: tuple[float, float] = (0, 1)


def fit_colours(shown: Sequence[Shown]) -> Colours:
    """One basis of tokens, one range of depths.

    Args:
        shown: What is shown of several images.
    """
    tokens = [item.patches.flatten(0, 1) for item in shown if isinstance(item, Tokens)]
    depths = [item.maps.flatten() for item in shown if isinstance(item, Depth)]
    basis, span = None, (0.0, 1.0)
    if tokens:
        every = torch.cat(tokens)
        basis = colour_basis(every[:: -(-len(every) // _BASIS_TOKENS)].float().cpu().numpy())
    if depths:
        low, high = np.percentile(torch.cat(depths).float().cpu().numpy(), _RANGE_PERCENT)
        span = (float(low), float(high))
    return Colours(basis, span)


def paint(shown: Shown, colours: Colours, image: Picture) -> Picture:
    """The picture of one image.

    Args:
        shown: What is shown of the image.
        colours: From :func:`fit_colours` of the same kind.
        image: Picture that is shown below masks.

    Returns:
        RGB, of the resolution of what is shown.
    """
    match shown:
        case Depth(maps):
            return depth_colours(maps[0].float().cpu().numpy(), colours.depth)
        case Masks(masks, _):
            return mask_colours(masks[0].cpu().numpy(), image)
        case Pictures(pixels):
            picture: Picture = pixels[0].cpu().numpy()
            return picture
        case Tokens(patches, grid_hw):
            numbers = patches[0].float().cpu().numpy()
            return pca_colours(numbers, grid_hw, colours.basis or colour_basis(numbers))


def depth_colours(depth: Array, span: tuple[float, float]) -> Picture:
    """Depth from dark (low) to bright (high), in the inferno colour map.

    Args:
        depth: Depth map, shape ``(H, W)``.
        span: Depths shown as the darkest and the brightest colour.
    """
    from matplotlib import colormaps

    low, high = span
    levels = np.clip((depth - low) / (high - low if high > low else 1), 0, 1)
    colours: Picture = np.round(255 * colormaps["inferno"](levels)[..., :3]).astype(np.uint8)
    return colours


def mask_colours(masks: Bools, image: Picture) -> Picture:
    """Masks over a pale grey image, the largest at the bottom, with white outlines.

    A colour says where a mask's centre lies (hue and saturation) and how large it is (lightness, small is bright): the
    same thing has the same colour beside its twin, and nearly so in the next frame.

    Args:
        masks: bool, shape ``(M, H, W)``.
        image: RGB, shape ``(H, W, 3)``, of the masks' size.
    """
    from skimage.color import lab2rgb

    grey = image.astype(np.float64).mean(2, keepdims=True) / 255
    canvas = np.repeat(0.15 + 0.7 * grey, 3, 2)
    areas = masks.sum((1, 2))
    for index in np.argsort(-areas, kind="stable"):
        mask = masks[index]
        if not areas[index]:
            continue
        rows, columns = np.nonzero(mask)
        down, right = (
            2 * (each.mean() + 0.5) / side - 1 for each, side in zip((rows, columns), mask.shape, strict=True)
        )
        lightness = 82 - 30 * np.sqrt(areas[index] / mask.size)
        # Centres crowd around the middle; the root spreads them over the plane of hues.
        a, b = (75 * np.sign(each) * np.sqrt(abs(each)) for each in (right, down))
        colour = lab2rgb([[[lightness, a, b]]])[0, 0]
        canvas[mask] = (1 - _IMAGE_SHARE) * colour + _IMAGE_SHARE * grey[mask]
        canvas[_outline(mask)] = 1
    painted: Picture = np.round(255 * canvas.clip(0, 1)).astype(np.uint8)
    return painted


def _outline(mask: Bools) -> Bools:
    """The pixels of a mask that touch its outside; the rim of the image is none."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Bools = mask & ~inner
    return edge


_HEIGHT = 256  # of a panel, in pixels
_ASPECTS = (0.5, 2.0)  # width by height: a strip is squeezed to these
_TOKENS = 64  # rows and columns of a grid of tokens, at most
_BORDER, _GAP, _GROUP_GAP = 8, 4, 20
_TITLE, _CAPTION, _LINE = 17, 14, 22  # heights of letters, and of a line
_INK, _PALE, _PAPER = (20, 20, 20), (100, 100, 100), (255, 255, 255)


@dataclass(frozen=True)
class Group:
    """Panels that belong together.

    Attributes:
        title: Title above the panels.
        panels: Caption and picture of each panel; at least one.
    """

    title: str
    panels: Sequence[tuple[str, Picture]]


def row(groups: Sequence[Group], aspect: float) -> Picture:
    """Draws groups from left to right; of the same size whatever the titles say.

    Args:
        groups: What to draw, at least one group.
        aspect: Width by height of the image that all panels show.

    Returns:
        RGB, with even sides, as videos need them.
    """
    width = round(_HEIGHT * min(max(aspect, _ASPECTS[0]), _ASPECTS[1]))
    widths = [len(group.panels) * (width + _GAP) - _GAP for group in groups]
    total = 2 * _BORDER + sum(widths) + _GROUP_GAP * (len(groups) - 1)
    top = _BORDER + 2 * _LINE
    height = top + _HEIGHT + _BORDER
    sheet = Image.new("RGB", (total + total % 2, height + height % 2), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = _BORDER
    for group, span in zip(groups, widths, strict=True):
        _write(draw, group.title, (left, _BORDER), span, _TITLE, _INK)
        for number, (caption, picture) in enumerate(group.panels):
            x = left + number * (width + _GAP)
            _write(draw, caption, (x, _BORDER + _LINE), width, _CAPTION, _PALE)
            sheet.paste(_fit(picture, width, _HEIGHT), (x, top))
        left += span + _GROUP_GAP
    drawn: Picture = np.asarray(sheet)
    return drawn


def _fit(picture: Picture, width: int, height: int) -> Image.Image:
    """Tokens stay sharp cells; what has pixels of its own becomes larger or smaller smoothly."""
    tokens = min(picture.shape[:2]) <= _TOKENS
    method = Image.Resampling.NEAREST if tokens else Image.Resampling.BICUBIC
    return Image.fromarray(picture).resize((width, height), method)


def _write(
    draw: ImageDraw.ImageDraw, text: str, at: tuple[int, int], width: int, size: int, ink: tuple[int, int, int]
) -> None:
    """Writes a line, smaller where it would be too wide, cut where it still is."""
    while size > 10 and _font(size).getlength(text) > width:
        size -= 1
    font = _font(size)
    if font.getlength(text) > width:
        fitting = bisect_right(range(len(text)), width, key=lambda count: int(font.getlength(text[:count] + "...")))
        text = text[: max(0, fitting - 1)] + "..."
    draw.text(at, text, fill=ink, font=font)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow gives its font without sizes only when it is asked for no size.
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))
