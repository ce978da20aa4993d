"""Frames of recorded robot episodes and of plain videos as images for extraction."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from theia.errors import ImageError, TrajectoryError
from theia.extraction.images import UnreadableImageError
from theia.trajectories.lerobot import LeRobotFolder, held_out
from theia.trajectories.video import VIDEO_ENDINGS, VideoCursor, video_info
from theia.types import Json

LEROBOT, VIDEO = "lerobot", "video"
_TRAIN = "train"


def open_recordings(kind: str, place: str, split: str, labels: bool, every: int) -> "EpisodeSource | VideoSource":
    """Opens recorded episodes or videos; see :func:`theia.extraction.sources.open_source`.

    Args:
        kind: ``lerobot`` or ``video``.
        place: Folder, with ``#CAMERA`` after that of a data set with several cameras; or one video.
        split: Name of the split.
        labels: Whether labels are asked for, which recordings do not have.
        every: Distance between the frames that are taken.
    """
    if labels:
        raise ImageError("Recordings have no labels. Extract without labels, or give a folder of classes.")
    if kind == LEROBOT:
        root, _, camera = place.partition("#")
        folder = LeRobotFolder(Path(root).expanduser())
        return EpisodeSource(folder, folder.camera(camera or None), split, every)
    path = Path(place).expanduser()
    if path.is_file():
        return VideoSource(path.parent, [path.name], split, every)
    if not path.is_dir():
        raise ImageError(f"There is no {path}. Give a folder of videos, or one video.")
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    hidden = [name for name in names if any(part.startswith(".") for part in name.split("/"))]
    return VideoSource(path, sorted(set(names) - set(hidden)), split, every)


class EpisodeSource:
    """Every k-th frame of one camera of a LeRobot data set.

    The split ``train`` has all episodes but every fifth of each task; any other split has every fifth. So no episode is
    ever divided between the two, and the held-out ones are those that ``theia probe dynamics`` holds out.

    Args:
        folder: The data set.
        camera: Key of the camera.
        split: Name of the split.
        every: Distance between the frames that are taken.

    Raises:
        ImageError: If no episode is left for the split.
    """

    def __init__(self, folder: LeRobotFolder, camera: str, split: str, every: int) -> None:
        out = folder.held_out_episodes()
        episodes = [episode for episode in folder.episodes if (episode.index in out) != (split == _TRAIN)]
        if not episodes:
            raise ImageError(
                f"{folder.root} has one episode, which is for the split 'train'; none is left for {split!r}. Record "
                "more, or give images of another place for it."
            )
        self._folder, self._camera = folder, camera
        self._places = [(episode, frame) for episode in episodes for frame in range(0, episode.length, every)]
        self.ids: Sequence[str] = [f"episode-{episode.index:06d}/frame-{frame:06d}" for episode, frame in self._places]
        self.labels: Sequence[int] | None = None
        self.classes: list[str] | None = None
        self.description: dict[str, Json] = {
            "kind": LEROBOT, "name": folder.root.resolve().name, "camera": camera, "every": every,
            "episodes": len(episodes),
        }  # fmt: skip

    def read(self, index: int) -> Image.Image:
        """Decodes one frame; RGB.

        Raises:
            UnreadableImageError: If the frame cannot be read.
        """
        episode, frame = self._places[index]
        try:
            return self._folder.frame(episode, frame, self._camera)
        except TrajectoryError as error:
            raise UnreadableImageError(str(error)) from error


class VideoSource:
    """Every k-th frame of the videos in a folder, at any depth, in sorted order.

    The split ``train`` has all videos but every fifth; any other split has every fifth. A single one is for ``train``.

    Args:
        root: Folder of the videos.
        names: Paths of the videos relative to it.
        split: Name of the split.
        every: Distance between the frames that are taken.

    Raises:
        ImageError: If there is no video, none is left for the split, or one cannot be opened.
    """

    def __init__(self, root: Path, names: Sequence[str], split: str, every: int) -> None:
        videos = [name for name in names if name.lower().endswith(VIDEO_ENDINGS)]
        if not videos:
            raise ImageError(f"No video in {root}. Names that count end in {', '.join(VIDEO_ENDINGS)} (any case).")
        out = held_out([""] * len(videos))
        chosen = [name for place, name in enumerate(videos) if (place in out) != (split == _TRAIN)]
        if not chosen:
            raise ImageError(
                f"{root / videos[0]} is the only video, and it is for the split 'train'; none is left for {split!r}. "
                "Give videos of another place for it."
            )
        self._root, self._videos, self._cursor = root, chosen, VideoCursor()
        infos = []
        for name in chosen:
            try:
                infos.append(video_info(root / name))
            except TrajectoryError as error:
                raise ImageError(str(error)) from error
        self._rates = [info.frames_per_s for info in infos]
        places = [(video, frame) for video, info in enumerate(infos) for frame in range(0, info.frames, every)]
        # An array instead of a million tuples, because worker processes get a copy.
        self._places = np.array(places, np.int64)
        self.ids: Sequence[str] = [f"{chosen[video]}/frame-{frame:06d}" for video, frame in places]
        self.labels: Sequence[int] | None = None
        self.classes: list[str] | None = None
        self.description: dict[str, Json] = {"kind": VIDEO, "videos": len(chosen), "every": every}

    def read(self, index: int) -> Image.Image:
        """Decodes one frame; RGB, upright.

        Raises:
            UnreadableImageError: If the video is damaged there.
        """
        video, frame = self._places[index].tolist()
        rate = self._rates[video]
        try:
            return self._cursor.read(self._root / self._videos[video], frame / rate, rate, exact=False)
        except TrajectoryError as error:
            raise UnreadableImageError(str(error)) from error
