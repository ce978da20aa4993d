"""A row of titled panels, drawn pixel by pixel: a video has thousands."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from theia.pictures import Picture

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
        title: Above all of them.
        panels: Caption and picture of each; at least one.
    """

    title: str
    panels: Sequence[tuple[str, Picture]]


def row(groups: Sequence[Group], aspect: float) -> Picture:
    """Draws groups from left to right; of the same size whatever the titles say.

    Args:
        groups: At least one.
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
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType")
    return font
