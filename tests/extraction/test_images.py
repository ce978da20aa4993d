import errno
import io
import logging
import os
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from theia.errors import ImageError
from theia.extraction import images as images_module
from theia.extraction.images import UnreadableImageError, decode, read_image, to_square

ORIENTATION = 0x0112


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def smooth_photo(width=64, height=48):
    """Gradients survive JPEG compression nearly unchanged."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (3 * x, 5 * y, 255 - 2 * x - 2 * y)
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def png(width, height, bits, colour_type, rows, extra=b""):
    """A PNG written by hand, for what Pillow reads but does not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# What a viewer does for each value of the tag, as numpy on (row, column).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(pixels(5, 9, 3)), format, exif=exif, **lossless)

    decoded = np.asarray(decode(data))

    # The same file without the tag, turned by hand.
    stored = np.asarray(
        Image.open(io.BytesIO(encode(Image.fromarray(pixels(5, 9, 3)), format, **lossless))).convert("RGB")
    )
    np.testing.assert_array_equal(decoded, UPRIGHT[orientation](stored))
    np.testing.assert_array_equal(decoded, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def test_an_orientation_that_does_not_exist_is_ignored():
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    image = pixels(5, 9, 3)
    np.testing.assert_array_equal(np.asarray(decode(encode(Image.fromarray(image), exif=exif))), image)


def test_damaged_exif_does_not_make_the_pixels_unreadable():
    image = smooth_photo()
    data = encode(image, "JPEG", exif=b"Exif\0\0nonsense that is no TIFF header")
    assert decode(data).size == image.size


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_rgb_is_unchanged(format):
    image = pixels(7, 5, 3)
    decoded = decode(encode(Image.fromarray(image), format))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), image)


def test_grey_becomes_three_equal_channels():
    grey = pixels(7, 5)
    np.testing.assert_array_equal(np.asarray(decode(encode(Image.fromarray(grey)))), np.stack([grey, grey, grey], -1))


def test_one_bit_becomes_black_and_white():
    bits = pixels(7, 5) > 127
    decoded = np.asarray(decode(encode(Image.fromarray(bits))))
    np.testing.assert_array_equal(decoded, 255 * bits[..., None].repeat(3, -1).astype(np.uint8))


PALETTE = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30], [200, 100, 50]], np.uint8)


def palette_image(indices):
    image = Image.new("P", indices.shape[::-1])
    image.putpalette(PALETTE.tobytes())
    image.putdata(indices.ravel().tolist())
    return image


def test_palette():
    indices = pixels(6, 8) % 4
    decoded = decode(encode(palette_image(indices)))
    np.testing.assert_array_equal(np.asarray(decoded), PALETTE[indices])


def test_transparent_palette_entry_becomes_white():
    indices = pixels(6, 8) % 4
    decoded = decode(encode(palette_image(indices), transparency=2))
    on_white = PALETTE.copy()
    on_white[2] = 255
    np.testing.assert_array_equal(np.asarray(decoded), on_white[indices])


def test_palette_with_an_alpha_for_every_entry_is_laid_on_white():
    indices = pixels(6, 8) % 4
    alpha = np.array([255, 0, 128, 64])
    decoded = decode(encode(palette_image(indices), transparency=bytes(alpha.tolist())))
    share = alpha[:, None] / 255
    expected = (PALETTE * share + 255 * (1 - share))[indices]
    np.testing.assert_allclose(np.asarray(decoded), expected, atol=1)


@pytest.mark.parametrize(("mode", "bands"), [("LA", 1), ("RGBA", 3)])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_alpha_is_laid_on_white(mode, bands, format):
    values = pixels(16, 16, bands + 1)
    values[0, :, -1] = 0
    values[1, :, -1] = 255
    decoded = np.asarray(decode(encode(Image.fromarray(values, mode), format)))
    share = values[..., -1:] / 255
    expected = values[..., :-1] * share + 255 * (1 - share)
    np.testing.assert_allclose(decoded, np.broadcast_to(expected, decoded.shape), atol=1)
    assert (decoded[0] == 255).all()
    np.testing.assert_array_equal(decoded[1], np.broadcast_to(values[1, :, :-1], decoded[1].shape))


def test_transparent_colour_of_a_grey_png_becomes_white():
    grey = np.array([[0, 7, 200]], np.uint8)
    decoded = np.asarray(decode(encode(Image.fromarray(grey), transparency=7)))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 255, 200])


def cmyk_bytes():
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, :16] = (255, 0, 0, 0)  # cyan
    inks[:, 16:32] = (0, 255, 255, 0)  # red
    inks[:, 32:] = (0, 0, 0, 128)  # half black
    return inks


def without_adobe_marker(data):
    position = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[position + 2 : position + 4])[0]
    assert data[position + 4 : position + 9] == b"Adobe"
    return data[:position] + data[position + 2 + length :]


def test_cmyk_jpeg_with_adobes_inverted_inks():
    data = encode(Image.fromarray(cmyk_bytes(), "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    decoded = np.asarray(decode(data)).astype(int)
    for column, colour in ((8, (0, 255, 255)), (24, (255, 0, 0)), (40, (127, 127, 127))):
        np.testing.assert_allclose(decoded[8, column], colour, atol=2)


def test_plain_cmyk_jpeg():
    # Pillow writes inverted inks: inverting them first gives a file with plain ones, once the marker is cut out.
    inks = Image.fromarray(255 - cmyk_bytes(), "CMYK")
    data = without_adobe_marker(encode(inks, "JPEG", quality=100))
    decoded = np.asarray(decode(data)).astype(int)
    for column, colour in ((8, (0, 255, 255)), (24, (255, 0, 0)), (40, (127, 127, 127))):
        np.testing.assert_allclose(decoded[8, column], colour, atol=2)


def test_cmyk_tiff():
    decoded = np.asarray(decode(encode(Image.fromarray(cmyk_bytes(), "CMYK"), "TIFF")))
    np.testing.assert_array_equal(decoded[8, [8, 24, 40]], [(0, 255, 255), (255, 0, 0), (127, 127, 127)])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    values = np.linspace(0, 65535, 1000).astype(np.uint16).reshape(10, 100)
    decoded = np.asarray(decode(encode(Image.fromarray(values), format)))
    np.testing.assert_array_equal(decoded, np.round(values / 65535 * 255)[..., None].repeat(3, -1))


def test_16_bit_big_endian_tiff():
    values = np.linspace(0, 65535, 100).astype(">u2").reshape(10, 10)
    file = io.BytesIO()
    Image.frombytes("I;16B", (10, 10), values.tobytes()).save(file, "TIFF")
    decoded = np.asarray(decode(file.getvalue()))
    np.testing.assert_array_equal(decoded[..., 0], np.round(values / 65535 * 255))


def test_transparent_level_of_a_16_bit_grey_png_becomes_white():
    data = encode(Image.fromarray(np.array([[0, 1000, 2000]], np.uint16)), transparency=1000)
    np.testing.assert_array_equal(np.asarray(decode(data))[0, :, 0], [0, 255, 8])


@pytest.mark.parametrize(("colour_type", "bands"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_and_alpha_are_scaled(colour_type, bands):
    values = np.random.default_rng(1).integers(0, 65536, (6, 8, bands)).astype(">u2")
    decoded = np.asarray(decode(png(8, 6, 16, colour_type, [row.tobytes() for row in values])))
    colour = values[..., :3] if bands > 2 else values[..., :1]
    share = values[..., -1:] / 65535 if bands in (2, 4) else 1
    expected = 255 * (colour / 65535 * share + 1 - share)
    np.testing.assert_allclose(decoded, np.broadcast_to(expected, decoded.shape), atol=2)


def exif_cut_short():
    """A JPEG whose EXIF puts a description far behind its end."""
    entry = struct.pack("<HHII", 0x010E, 2, 1000, 0xFFFFFF)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
    return encode(Image.new("RGB", (8, 8)), "JPEG", exif=exif)


def animation_of_nothing():
    body = b"acTL" + bytes(8)
    chunk = struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body))
    return png(8, 8, 8, 2, [bytes(24)] * 8, chunk)


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        (encode(Image.new("RGB", (11, 10))), "could be decompression bomb"),
        (exif_cut_short(), "Tag data larger than file|Truncated File Read"),  # depends on Pillow's release
        (animation_of_nothing(), "Invalid APNG"),
    ],
    ids=["large", "cut EXIF", "animation of nothing"],
)
def test_what_pillow_warns_of_is_decoded_without_a_word(data, warning, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # it warns above, and refuses above twice as many
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(data)) as image:
            image.getexif()
        assert re.search(warning, str(warned[0].message))
        warned.clear()
        assert decode(data).mode == "RGB"
        assert not warned


def test_decoding_in_threads_does_not_make_the_warnings_of_others_new_again():
    data = encode(smooth_photo())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                list(pool.map(decode, [data] * 20))
                warnings.warn("of another module, to be shown once", stacklevel=1)
    assert len(warned) == 1


def test_what_pillow_logs_is_not_printed(capsys, monkeypatch):
    # Without any handler Python prints a record of this level on stderr.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded: 9")
    assert not capsys.readouterr().err


def test_the_content_decides_not_the_name(tmp_path):
    image = pixels(4, 4, 3)
    path = tmp_path / "named.jpg"
    path.write_bytes(encode(Image.fromarray(image), "PNG"))
    np.testing.assert_array_equal(np.asarray(read_image(path)), image)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.1, 0.6, 0.95])
def test_truncated_image_is_unreadable(format, kept):
    data = encode(Image.fromarray(pixels(64, 64, 3)), format)
    with pytest.raises(UnreadableImageError, match=r"truncated|damaged|decode"):
        decode(data[: int(kept * len(data))])


def test_flipped_bytes_in_a_png_are_unreadable():
    data = bytearray(encode(Image.fromarray(pixels(64, 64, 3))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"just some text", "not a JPEG, PNG"),
        (b"\xff\xd8\xff", "not a JPEG, PNG"),
        (encode(Image.new("RGB", (4, 4)), "EPS"), "not a JPEG, PNG"),
        (png(0, 4, 8, 2, [b""] * 4), "not a JPEG, PNG"),
        (png(20_000, 20_000, 8, 2, [b""]), "DecompressionBomb"),
        (encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "no defined range"),
        (encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "no defined range"),
    ],
    ids=["empty", "text", "start of a JPEG", "EPS", "no width", "bomb", "float", "32-bit"],
)
def test_unreadable_data_gives_a_reason(data, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        decode(data)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_failing_file_system_is_no_fault_of_the_image(tmp_path, monkeypatch, code):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ImageError, match=rf"a\.jpg cannot be read: .*{os.strerror(code)}.*same command again") as error:
        read_image(tmp_path / "a.jpg")
    assert not isinstance(error.value, UnreadableImageError)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENXIO, errno.EISDIR])
def test_what_the_system_says_of_one_file_is_its_fault(tmp_path, monkeypatch, code):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(UnreadableImageError, match=f"cannot be read: .*{os.strerror(code)}"):
        read_image(tmp_path / "a.jpg")


def test_a_file_larger_than_the_memory_is_unreadable(tmp_path, monkeypatch):
    class Huge(io.BytesIO):
        def read(self, size=-1):
            raise MemoryError

    monkeypatch.setattr(images_module, "open_regular", lambda path: Huge())
    with pytest.raises(UnreadableImageError, match="does not fit into memory"):
        read_image(tmp_path / "a.jpg")


def test_missing_archive_is_no_fault_of_the_image(tmp_path):
    with pytest.raises(ImageError, match=r"No such file.*same command again") as error:
        read_image(tmp_path / "a.tar", 512, 1000)
    assert not isinstance(error.value, UnreadableImageError)


def test_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImageError, match="No such file"):
        read_image(tmp_path / "gone.jpg")


def test_a_stretch_of_a_file_is_read(tmp_path):
    image = pixels(4, 4, 3)
    data = encode(Image.fromarray(image))
    path = tmp_path / "many.bin"
    path.write_bytes(b"before" + data + b"after")
    np.testing.assert_array_equal(np.asarray(read_image(path, 6, len(data))), image)


def test_squash_is_pillows_resize():
    image = Image.fromarray(pixels(300, 500, 3))
    square = to_square(image, 224, "squash")
    assert square.dtype == np.uint8
    assert square.shape == (3, 224, 224)
    assert square.flags.c_contiguous
    expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(square.transpose(1, 2, 0), expected)


def test_squash_is_antialiased():
    image = Image.fromarray(pixels(640, 640, 3))
    tensor = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float()[None]
    expected = torch.nn.functional.interpolate(tensor, (64, 64), mode="bicubic", antialias=True)
    np.testing.assert_allclose(to_square(image, 64, "squash"), expected[0].clip(0, 255), atol=1.5)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (333, 224), (224, 224), (61, 97), (1001, 353)])
def test_centre_crop_is_torchvisions(shape):
    image = Image.fromarray(pixels(*shape, 3))
    upstream = v2.Compose([v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    np.testing.assert_array_equal(to_square(image, 224, "center_crop").transpose(1, 2, 0), np.asarray(upstream(image)))


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_centre_crop_of_a_thin_strip_stays_small(size):
    # Resized as a whole this one would have a billion pixels.
    square = to_square(Image.new("RGB", size, (10, 20, 30)), 224, "center_crop")
    np.testing.assert_array_equal(square.reshape(3, -1).T, np.broadcast_to((10, 20, 30), (224 * 224, 3)))


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "JPEG2000"])
def test_later_formats_are_read(kind):
    colours = Image.new("RGB", (16, 16), (200, 30, 60))
    options = {"quality": 100} if kind == "AVIF" else {}
    assert np.abs(np.asarray(decode(encode(colours, kind, **options)), int) - (200, 30, 60)).max() <= 3


def test_a_moving_gif_gives_its_first_frame():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=[second])
    assert decode(file.getvalue()).getpixel((3, 3)) == (255, 0, 0)
