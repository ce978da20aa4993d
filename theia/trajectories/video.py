"""Frames of video files by time. Each frame is decoded once as long as times ascend."""

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

from PIL import Image

from theia.errors import ConfigError, TrajectoryError

VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif")

# Decoding this far ahead costs less than opening the file again and decoding from its last key frame.
_READ_ON_S = 2.0


class VideoInfo(NamedTuple):
    """What a video file says about itself.

    Attributes:
        frames: Number of frames.
        frames_per_s: Average frame rate.
    """

    frames: int
    frames_per_s: float


def load_av() -> ModuleType:
    """Imports PyAV.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError("Videos are read by PyAV, which is not installed: pip install 'theia[video]'.") from error
    return av


def video_info(path: Path) -> VideoInfo:
    """Reads how long a video is; decodes its first frame only.

    Raises:
        TrajectoryError: If the file is missing, cannot be read as a video, or has no frames.
        ConfigError: If PyAV is not installed.
    """
    av = load_av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            count = stream.frames
            if next(container.decode(stream), None) is None:
                count = 0
        if not count:  # not every container knows how many there are
            with av.open(str(path)) as container:
                count = sum(1 for packet in container.demux(video=0) if packet.size)
    except Exception as error:
        # Files of any content make the libraries below raise nearly anything.
        raise TrajectoryError(_cannot_read(path, error)) from error
    if not count:
        raise TrajectoryError(f"The video {path} has no frames. Record it again, or remove it.")
    return VideoInfo(count, rate)


class VideoCursor:
    """Reads frames of video files and stays where the last one ended, so that reading on costs no seek.

    It can be pickled and forked; every process opens files of its own. Threads take turns.
    """

    _container: Any
    _path: Path | None
    _frames: Iterator[Any]
    _frame: Any
    _time_s: float

    def __init__(self) -> None:
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()

    def read(self, path: Path, time_s: float, frames_per_s: float, exact: bool = True) -> Image.Image:
        """Decodes the frame that is shown at a time.

        Args:
            path: Video file.
            time_s: Time from the start of the video, in seconds.
            frames_per_s: Frame rate. The frame begins at most half a frame before the time.
            exact: Whether to refuse a frame that begins more than half a frame after it, as in a video whose frame rate
                varies.

        Returns:
            The frame in RGB, upright.

        Raises:
            TrajectoryError: If the file is missing or damaged there, or has no frame at that time.
            ConfigError: If PyAV is not installed.
        """
        with self._lock:
            if self._process != os.getpid():  # forked; what the parent has open is not touched
                self._begin()
            try:
                return self._read(path, time_s, 0.5 / frames_per_s, exact)
            except BaseException:
                self._close_file()
                raise

    def _read(self, path: Path, time_s: float, half: float, exact: bool) -> Image.Image:
        behind = path != self._path or time_s < self._time_s - half or time_s > self._time_s + _READ_ON_S
        if behind:
            self._seek(path, time_s)
            self._go_on(path, time_s - half)
            if self._time_s > time_s + half:  # some containers seek too far
                self._seek(path, 0)
        self._go_on(path, time_s - half)
        if exact and self._time_s > time_s + half:
            raise TrajectoryError(
                f"{path} has no frame at {time_s:.2f} s; the next one is at {self._time_s:.2f} s. Its frame rate is "
                "another one, or it is damaged: copy or record it again."
            )
        picture: Image.Image = self._frame.to_image()
        # Telephones store what they film lying down, and how to turn it.
        turned = self._frame.rotation % 360
        return picture.rotate(turned, expand=True) if turned else picture

    def _go_on(self, path: Path, time_s: float) -> None:
        """Decodes until a frame that begins at a time or later."""
        while self._time_s < time_s:
            try:
                frame = next(self._frames, None)
            except Exception as error:
                # Damaged data makes decoders raise nearly anything.
                raise TrajectoryError(_cannot_read(path, error, time_s)) from error
            if frame is None:
                raise TrajectoryError(
                    f"{path} ends before {time_s:.2f} s, where there should be a frame. It is cut short, or belongs to "
                    "other data: copy or record it again."
                )
            self._frame, self._time_s = frame, float(frame.time) - self._start_s

    def _seek(self, path: Path, time_s: float) -> None:
        av = load_av()
        self._close_file()
        try:
            self._container = av.open(str(path))
            stream = self._container.streams.video[0]
            self._start_s = float((stream.start_time or 0) * stream.time_base)
            # To the last key frame before the time; a container without an index starts at its beginning.
            if time_s > 0:
                self._container.seek(int((time_s + self._start_s) / stream.time_base), stream=stream)
        except Exception as error:
            raise TrajectoryError(_cannot_read(path, error, time_s)) from error
        self._path, self._frames = path, self._container.decode(stream)

    def _begin(self) -> None:
        self._lock, self._process = Lock(), os.getpid()
        self._container, self._path, self._frames, self._frame = None, None, iter(()), None
        self._time_s, self._start_s = float("-inf"), 0.0

    def _close_file(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container, self._path, self._frames, self._frame = None, None, iter(()), None
        self._time_s, self._start_s = float("-inf"), 0.0


def _cannot_read(path: Path, error: Exception, time_s: float | None = None) -> str:
    if isinstance(error, FileNotFoundError):
        return f"There is no video {path}. Copy it again, or remove its episodes from the data set."
    where = "" if time_s is None else f" at {time_s:.2f} s"
    return (
        f"The video {path} cannot be read{where} ({type(error).__name__}: {error}). It is damaged, cut short or of "
        "another kind: copy or record it again."
    )
