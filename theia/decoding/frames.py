"""What is shown: images or the frames of a video, which PyAV (an extra) or, for GIFs, Pillow reads and writes."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from PIL import Image

from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError
from theia.extraction.sources import ImageSource
from theia.extraction.stream import open_images
from theia.extraction.user_files import open_regular, reason
from theia.trajectories.video import VIDEO_ENDINGS
from theia.utils.files import replacing
from theia.utils.pictures import Picture

GIF = ".gif"

_QUALITY = "18"  # of x264: no difference is seen
_MILLISECONDS = 100  # of a GIF's frame that does not say


class Frames(Protocol):
    """Images, or the frames of a video.

    Attributes:
        skipped: Reason why a picture could not be read, by id; filled while reading.
    """

    skipped: dict[str, str]

    @property
    def ids(self) -> Sequence[str]:
        """Ids of all pictures, in order, unique."""

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
        """Reads some of the pictures.

        Args:
            indices: Indices of the pictures to read, ascending.

        Yields:
            Index and picture, RGB, any size. Unreadable ones are left out and noted in ``skipped``.
        """


def open_frames(location: str) -> Frames:
    """Opens a video, by its ending, or anything that holds images.

    Raises:
        ConfigError: If it is a video, and PyAV is not installed.
        ImageError: If nothing is there, or what is there cannot be read.
    """
    path = Path(location)
    if path.suffix.lower() in VIDEO_ENDINGS and not path.is_dir():
        return Video(path)
    return Images(open_images(location))


class Images:
    """The images of a source; see :class:`Frames`."""

    def __init__(self, source: ImageSource) -> None:
        self.ids: Sequence[str] = source.ids
        self.skipped: dict[str, str] = {}
        self._source = source

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
        """See :meth:`Frames.pick`."""
        for index in indices:
            try:
                image = self._source.read(index)
            except UnreadableImageError as error:
                self.skipped[self.ids[index]] = str(error)
                continue
            yield index, image


class Video:
    """A video file, read from its start whenever frames are asked for; see :class:`Frames`.

    Args:
        path: File with one of :data:`VIDEO_ENDINGS`.

    Attributes:
        frames_per_s: Average frame rate; one that varies becomes even.
        ids: ``frame-000000`` and so on, as many as the file announces.
        skipped: See :class:`Frames`.
        film: Name of the video that is made from this one.

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
        self.film = path.stem + (GIF if path.suffix.lower() == GIF else ".mp4")

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
        """See :meth:`Frames.pick`; what follows damage, or is only announced, is left out."""
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
    """Opens a video for writing; it is there, whole, when the block has ended well.

    Args:
        path: File to write, which ends in ``.mp4`` or ``.gif``.
        frames_per_s: Frame rate.

    Yields:
        A function that takes the next frame, RGB of shape ``(H, W, 3)`` with even sides. All frames have one size, and
        there is at least one.
    """
    if path.suffix.lower() == GIF:
        frames: list[Image.Image] = []
        # 256 colours now: a GIF is written as a whole.
        yield lambda picture: frames.append(Image.fromarray(picture).quantize(256))
        duration = round(1000 / frames_per_s)
        with replacing(path) as temporary:
            frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return
    av: Any = _av()
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        codec, options = ("libx264", {"crf": _QUALITY}) if "libx264" in av.codecs_available else ("mpeg4", {})
        stream = container.add_stream(codec, rate=frames_per_s.limit_denominator(60_000), options=options)
        stream.pix_fmt = "yuv420p"

        def add(picture: Picture) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

        yield add
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
