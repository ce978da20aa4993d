"""Videos in and out: through PyAV, an optional extra, and GIFs through Pillow."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from theia.errors import ConfigError, ImageError
from theia.extraction.files import open_regular, reason
from theia.utils.pictures import Picture

GIF = ".gif"
VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", GIF)

_QUALITY = "18"  # of x264: no difference is seen
_MILLISECONDS = 100  # of a GIF's frame that does not say


class Video:
    """A video file, read from its start whenever frames are asked for.

    Args:
        path: Of one of :data:`VIDEO_ENDINGS`.

    Attributes:
        frames_per_s: On average; a varying rate becomes even.
        ids: ``frame-000000`` and so on, as many as the file announces.
        skipped: See :class:`theia.decoding.viewer.Frames`.

    Raises:
        ConfigError: If PyAV is not installed.
        ImageError: If the file is missing or cannot be read as a video.
    """

    def __init__(self, path: Path) -> None:
        self.skipped: dict[str, str] = {}
        self._path = path
        self._read: Callable[[Path], Iterator[Image.Image]]
        if path.suffix.lower() == GIF:
            self._read = _read_gif
            count, self.frames_per_s = _about(path, _about_gif)
        else:
            _av()
            self._read = _read_video
            count, self.frames_per_s = _about(path, _about_video)
        self.ids = [f"frame-{index:06d}" for index in range(count)]

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
        """See :meth:`theia.decoding.viewer.Frames.pick`; what follows damage, or is announced only, is left out."""
        wanted = iter(indices)
        index = next(wanted, None)
        frames = self._read(self._path)
        reached = 0
        while index is not None:
            try:
                frame = next(frames, None)
            except Exception as error:
                # Damaged data makes decoders raise nearly anything.
                self.skipped[self.ids[reached]] = f"damaged from here on: {type(error).__name__}: {error}"
                return
            if frame is None:
                self.skipped[self.ids[reached]] = f"the video ends here; it announces {len(self.ids)} frames"
                return
            if reached == index:
                yield index, frame
                index = next(wanted, None)
            reached += 1


@contextmanager
def video_writer(path: Path, frames_per_s: Fraction) -> Iterator[Callable[[Picture], None]]:
    """Opens a video for writing.

    Args:
        path: Ends in ``.mp4`` or ``.gif``.
        frames_per_s: Of all frames.

    Yields:
        A function that takes the next frame: RGB, ``(H, W, 3)`` with even sides, all of one size.
    """
    if path.suffix.lower() == GIF:
        frames: list[Image.Image] = []
        # 256 colours now: a GIF is written as a whole.
        yield lambda picture: frames.append(Image.fromarray(picture).quantize(256))
        if frames:
            duration = round(1000 / frames_per_s)
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return
    av: Any = _av()
    with av.open(str(path), "w") as container:
        codec, options = ("libx264", {"crf": _QUALITY}) if "libx264" in av.codecs_available else ("mpeg4", {})
        stream = container.add_stream(codec, rate=frames_per_s.limit_denominator(60_000), options=options)
        stream.pix_fmt = "yuv420p"

        def add(picture: Picture) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

        try:
            yield add
        finally:
            if stream.codec_context.is_open:
                container.mux(stream.encode())


def _about(path: Path, read: Callable[[Path], tuple[int, Fraction]]) -> tuple[int, Fraction]:
    # What is no regular file would keep the libraries below waiting.
    try:
        open_regular(path).close()
    except FileNotFoundError as error:
        raise ImageError(f"There is no video {path}. Correct --images.") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {reason(path, error)}. Give a video with --images.") from error
    try:
        count, frames_per_s = read(path)
    except Exception as error:
        # Files of any content make the libraries below raise nearly anything.
        raise ImageError(
            f"{path} cannot be read as a video ({type(error).__name__}: {error}). It is damaged, cut short or of "
            "another kind; play it, or convert it with ffmpeg."
        ) from error
    if not count:
        raise ImageError(f"{path} has no frames. Give another video.")
    return count, frames_per_s


def _about_video(path: Path) -> tuple[int, Fraction]:
    with _av().open(str(path)) as container:
        stream = container.streams.video[0]
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        # One that decodes shows that the rest is worth a try; not every container knows how many there are.
        first = next(container.decode(stream), None)
        count = stream.frames
    if first is None or count:
        return (count if first is not None else 0), rate
    with _av().open(str(path)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size), rate


def _read_video(path: Path) -> Iterator[Image.Image]:
    with _av().open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            picture: Image.Image = frame.to_image()
            # Telephones store what they film lying down, and how to turn it.
            turned = frame.rotation % 360
            yield picture.rotate(turned, expand=True) if turned else picture


def _about_gif(path: Path) -> tuple[int, Fraction]:
    durations: list[float] = []
    with Image.open(path, formats=("GIF",)) as image:
        for index in itertools.count():
            try:
                image.seek(index)
            except EOFError:
                if durations and _is_cut(path):
                    durations.append(durations[-1])
                break
            except Exception:
                # Cut short, which Pillow says in many ways. Reading it says where; the damaged frame counts as one.
                durations.append(durations[-1] if durations else _MILLISECONDS)
                break
            durations.append(image.info.get("duration", 0) or _MILLISECONDS)
    return len(durations), Fraction(1000 * len(durations), round(sum(durations)))


def _read_gif(path: Path) -> Iterator[Image.Image]:
    with Image.open(path, formats=("GIF",)) as image:
        for index in itertools.count():
            try:
                image.seek(index)
            except EOFError as error:
                if _is_cut(path):
                    raise ImageError("the file is cut short") from error
                return
            yield image.convert("RGB")


def _is_cut(path: Path) -> bool:
    """Whether a GIF lacks its last byte: Pillow takes a cut between two frames for the end."""
    return not path.read_bytes().rstrip(b"\0").endswith(b";")


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "Videos are read and written by PyAV, which is not installed: pip install 'theia[video]'. Without it, GIFs "
            "and folders of frames can be decoded."
        ) from error
    return av
