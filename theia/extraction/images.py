"""Decodes image files to RGB pixels, and resizes those to the square that teachers and student see."""

import importlib
import io
import logging
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, UnidentifiedImageError, features

from theia.errors import ImageError
from theia.extraction.user_files import FORMATS_SAID, HAS_HEIF, is_fault_of_one_file, open_regular, reason
from theia.store.schema import Resize

# For the record of an image set.
RESIZE_FILTER = "bicubic, antialiased (Pillow)"

# The format follows from the content, not from the ending; parsers of other formats never see the data.
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP", "GIF", "JPEG2000", *(["AVIF"] if features.check("avif") else []))

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112

_MAX_ASPECT = 16

_PILLOW = r"PIL\."
# Without a logging handler, Python would print Pillow's log messages: bare lines that name no image.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnreadableImageError(ImageError):
    """One image cannot be read or decoded. The message is the reason alone; the caller knows which image it is."""


def read_image(path: Path, offset: int = 0, size: int = -1) -> Image.Image:
    """Reads and decodes an image that is a whole file or a part of one.

    Args:
        path: File that holds the image.
        offset: First byte of the image.
        size: Number of bytes of the image; ``-1`` for all that follow.

    Returns:
        The image in RGB.

    Raises:
        UnreadableImageError: If the file is missing, forbidden, too large for the memory or not a regular one, or for
            the reasons given under :func:`decode`.
        ImageError: If the file cannot be read for a reason that is not its own, such as a failing file system.
    """
    # The file is opened for each image: beside decoding it costs nothing, and no handle has to survive a fork.
    try:
        with open_regular(path) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        # A missing file is one lost image; with a missing archive all of its images are lost.
        if is_fault_of_one_file(error) and size < 0:
            raise UnreadableImageError(f"cannot be read: {reason(path, error)}") from error
        raise ImageError(
            f"{path} cannot be read: {error}. Whole shards are kept; run the same command again."
        ) from error
    except MemoryError as error:
        raise UnreadableImageError("does not fit into memory") from error
    return decode(data)


def decode(data: bytes) -> Image.Image:
    """Decodes an image file to upright RGB.

    EXIF orientation is applied; a transparent image is laid on white; 16-bit grey is scaled to 8 bits; CMYK is
    converted by the plain formula, inverted if the JPEG has Adobe's marker. Colour profiles are ignored, and only the
    first of several frames is decoded. JPEGs are decoded at full size: Pillow's draft mode is quicker but changes the
    pixels. Pillow's warnings are not passed on: damaged metadata changes no pixel, and an image that is large enough
    for a warning, but not too large, is treated like any other.

    Args:
        data: Content of a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or JPEG 2000 file, or of HEIC with pillow-heif.

    Returns:
        The image in RGB.

    Raises:
        UnreadableImageError: If the data is not such a file, is damaged or cut short, claims more pixels than Pillow's
            guard against decompression bombs allows, or has pixels without a defined 8-bit range (32-bit TIFF).
    """
    if not data:
        raise UnreadableImageError("empty file")
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            # Must come before the orientation is read: Pillow rotates a TIFF as it loads, and a PNG may end with EXIF.
            image.load()
            rgb = _to_rgb(image)
            method = _UPRIGHT.get(_orientation(image))
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"not a {FORMATS_SAID} image, or its header is damaged{_missing_decoder(data)}"
        ) from error
    except Exception as error:
        # Damaged data makes decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise UnreadableImageError(f"cannot be decoded: {type(error).__name__}: {error}") from error
    return rgb if method is None else rgb.transpose(method)


@cache
def _formats() -> tuple[str, ...]:
    if not HAS_HEIF:
        return _FORMATS
    importlib.import_module("pillow_heif").register_heif_opener()
    return (*_FORMATS, "HEIF")


def _missing_decoder(data: bytes) -> str:
    if data[4:12] == b"ftypavif" and "AVIF" not in _FORMATS:
        return "; this Pillow cannot read AVIF: pip install 'pillow>=11.3'"
    return ""


def to_square(image: Image.Image, size: int, resize: Resize) -> npt.NDArray[np.uint8]:
    """Resizes an image to the square that is stored.

    Args:
        image: Image in RGB.
        size: Height and width of the result, in pixels.
        resize: ``"squash"`` scales both edges to ``size`` and keeps all of the image; ``"center_crop"``
            scales the short edge to ``size``, keeps the aspect and cuts the ends of the long edge.

    Returns:
        Pixels, uint8, shape ``(3, size, size)``, contiguous. Both ways use Pillow's antialiased bicubic filter.
    """
    squash = resize == "squash"
    square = image.resize((size, size), Image.Resampling.BICUBIC) if squash else _center_crop(image, size)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _silence_pillow() -> None:
    """Silences Pillow's warnings, which name no image and would come for many images."""
    # Done once, and not around each image: all threads share the filters, and each change makes Python show other
    # modules' one-time warnings again.
    if not any(getattr(module, "pattern", None) == _PILLOW for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW)


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    # Otherwise a strip would be enlarged to gigabytes before all but its middle is cut away.
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) > longest:
        image = _cut(image, min(image.width, longest), min(image.height, longest))
    short = min(image.size)
    width, height = (size * edge // short for edge in image.size)
    return _cut(image.resize((width, height), Image.Resampling.BICUBIC), size, size)


def _cut(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _to_rgb(image: Image.Image) -> Image.Image:
    # Older Pillow opens a 16-bit grey PNG in mode "I"; in other formats that mode means 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"32-bit pixels (mode {image.mode!r}) have no defined range to bring to 8 bits")
    # Pillow treats every CMYK JPEG as one of Adobe's, whose inks are inverted.
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    # 65535 / 257 = 255. Pillow's own conversion clips at 255 instead.
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        # Damaged metadata does not make the pixels unreadable; viewers show such an image as it is stored.
        return 1
