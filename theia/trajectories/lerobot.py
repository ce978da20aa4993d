"""Reads LeRobot's data set folders, v3.0 and v2.1: episodes, states and actions, and the frames of each camera."""

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from theia.errors import ConfigError, TrajectoryError
from theia.trajectories.video import VideoCursor

INFO = "meta/info.json"
STATE, ACTION = "observation.state", "action"

# What the templates of paths in v3.0 and v2.1 name besides the camera.
_PLACES = ("chunk_index", "file_index", "episode_chunk", "episode_index")

# Columns that the format itself adds to those of the robot.
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class Feature:
    """One column of a data set, as its ``info.json`` declares it.

    Attributes:
        dtype: Type of the values; ``video`` or ``image`` for a camera.
        shape: Shape of one frame's value.
        names: Names of the values, where they are known.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Episode:
    """One recorded episode.

    Attributes:
        index: Number of the episode in the data set.
        start: Number of frames in all episodes before it.
        length: Number of its frames.
        tasks: What the robot was told to do.
        record: Row of the episode in the metadata, which says where its data and videos are.
    """

    index: int
    start: int
    length: int
    tasks: tuple[str, ...]
    record: Mapping[str, Any] = field(repr=False, compare=False)


class _Stretch(NamedTuple):
    """Part of a video that shows one episode."""

    path: Path
    start_s: float


class LeRobotFolder:
    """A data set folder in LeRobot's format.

    It can be pickled and forked: files are opened when a frame is read.

    Args:
        root: The folder, which holds ``meta/info.json``.

    Attributes:
        root: The folder.
        version: Version of the format, such as ``v3.0``.
        frames_per_s: Frame rate of the recordings.
        features: Columns of the data set, by key.
        cameras: Keys of the columns that hold pictures.
        episodes: All episodes, in order.

    Raises:
        TrajectoryError: If the folder is no such data set, is of another version, or its metadata are damaged or do
            not fit together.
        ConfigError: If pyarrow is not installed.
    """

    cameras: tuple[str, ...]
    episodes: tuple[Episode, ...]

    def __init__(self, root: Path) -> None:
        self.root = root
        info = self._json(INFO)
        self.version = str(info.get("codebase_version"))
        if self.version not in ("v2.0", "v2.1", "v3.0"):
            raise TrajectoryError(
                f"{root / INFO} has the format {self.version}; v3.0, v2.1 and v2.0 can be read. Convert the data set "
                "with LeRobot's own script."
            )
        try:
            self.frames_per_s = float(info["fps"])
            self.features: dict[str, Feature] = {key: _feature(about) for key, about in info["features"].items()}
            self._data_path, self._video_path = str(info["data_path"]), str(info.get("video_path"))
            self._chunk_size = int(info.get("chunks_size") or 1000)
            total = int(info["total_episodes"])
            if not self.frames_per_s > 0:
                raise ValueError(f"fps is {self.frames_per_s}")
            for path in (self._data_path, self._video_path):
                path.format(video_key="", **dict.fromkeys(_PLACES, 0))  # no other placeholders
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise TrajectoryError(
                f"{root / INFO} is damaged: {type(error).__name__}: {error}. Copy the data set again."
            ) from error
        self.cameras = tuple(key for key, feature in self.features.items() if feature.dtype in ("video", "image"))
        self.episodes = tuple(self._episodes(total))
        self._cursor = VideoCursor()
        self._pictures: tuple[int, Path, int, list[Any]] | None = None  # process, file, first row, column

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pictures": None}

    @property
    def frame_count(self) -> int:
        """Number of frames of all episodes."""
        return self.episodes[-1].start + self.episodes[-1].length

    def camera(self, key: str | None = None) -> str:
        """Finds a camera by its key, by the end of its key (``wrist``), or the only one.

        Raises:
            ConfigError: If there is no such camera, or several. The message lists them.
        """
        there = f"{self.root} has the cameras {', '.join(self.cameras)}." if self.cameras else ""
        if not self.cameras:
            raise ConfigError(
                f"{self.root} has no camera: no column of {INFO} is a video or an image. Record pictures."
            )
        if key is None:
            if len(self.cameras) > 1:
                raise ConfigError(f"{there} Choose one.")
            return self.cameras[0]
        found = [name for name in self.cameras if name == key] or [
            name for name in self.cameras if name.endswith((f".{key}", f"/{key}"))
        ]
        if len(found) != 1:
            raise ConfigError(
                f"{there} {'None' if not found else 'More than one'} of them is {key!r}. Correct the name."
            )
        return found[0]

    def column(self, key: str) -> NDArray[np.float32]:
        """Values of one column for all frames, episode after episode.

        Args:
            key: Key of the column, such as ``action``.

        Returns:
            Values as float32, shape ``(frames, size)``.

        Raises:
            ConfigError: If there is no such column, or it holds pictures or text. The message lists the columns.
            TrajectoryError: If a file is missing or damaged, or an episode has another number of frames there, or
                values that are not finite. The message names file and episode.
        """
        feature = self.features.get(key)
        if feature is None or feature.dtype in ("video", "image", "string"):
            numbers = [
                name
                for name, about in self.features.items()
                if about.dtype not in ("video", "image", "string") and name not in BOOKKEEPING
            ]
            raise ConfigError(
                f"{self.root} has no column {key!r} of numbers. There are: {', '.join(numbers) or 'none'}."
            )
        size = int(np.prod(feature.shape))
        values = np.empty((self.frame_count, size), np.float32)
        for path, episodes in self._by_file.items():
            table = self._read(path, ["episode_index", key])
            numbers_of = table.column("episode_index").to_numpy()
            rows = _flat(table.column(key), len(numbers_of))
            for episode in episodes:
                found = np.flatnonzero(numbers_of == episode.index)
                if len(found) != episode.length:
                    raise TrajectoryError(
                        f"Episode {episode.index} has {len(found)} frames in {path}, but {episode.length} in the "
                        "metadata. Copy the data set again, or record the episode again."
                    )
                part = None if rows is None else rows[found]
                if part is None or part.shape[1] != size:
                    raise TrajectoryError(
                        f"{key!r} of episode {episode.index} in {path} does not have {size} numbers in each frame, as "
                        f"{INFO} says. Correct one of the two."
                    )
                if not np.isfinite(part).all():
                    frame = int(np.flatnonzero(~np.isfinite(part).all(1))[0])
                    raise TrajectoryError(
                        f"{key!r} of episode {episode.index}, frame {frame}, in {path} is not a finite number. Remove "
                        "the episode, or record it again."
                    )
                values[episode.start : episode.start + episode.length] = part
        return values

    def frame(self, episode: Episode, index: int, camera: str) -> Image.Image:
        """Decodes one frame; reading on within an episode costs no seek.

        Args:
            episode: One of :attr:`episodes`.
            index: Number of the frame in the episode.
            camera: Key of the camera.

        Returns:
            The frame, RGB.

        Raises:
            TrajectoryError: If a file is missing or damaged, or does not have the frame. The message names file and
                episode.
        """
        try:
            if self.features[camera].dtype == "video":
                path, start_s = self._stretch(episode, camera)
                return self._cursor.read(path, start_s + index / self.frames_per_s, self.frames_per_s)
            return self._picture(episode, index, camera)
        except TrajectoryError as error:
            raise TrajectoryError(f"Episode {episode.index}, frame {index}: {error}") from error

    def frames(self, episode: Episode, camera: str, indices: Iterable[int]) -> Iterator[Image.Image]:
        """Decodes frames of an episode, ascending; see :meth:`frame`."""
        for index in indices:
            yield self.frame(episode, index, camera)

    def held_out_episodes(self) -> frozenset[int]:
        """Numbers of the held-out episodes; see :func:`held_out`."""
        return held_out(self.tasks)

    @cached_property
    def tasks(self) -> list[str]:
        """Task of every episode; several tasks of one episode are joined."""
        return ["; ".join(episode.tasks) for episode in self.episodes]

    def _episodes(self, total: int) -> Iterator[Episode]:
        rows = self._episode_rows()
        if len(rows) != total:
            raise TrajectoryError(
                f"The metadata of {self.root} list {len(rows)} episodes, but {INFO} says {total}. The recording was "
                "not finished, or a file is missing: finish it, or copy the data set again."
            )
        if not rows:
            raise TrajectoryError(f"{self.root} has no episodes. Record some.")
        start = 0
        try:
            numbered = sorted((int(row["episode_index"]), int(row["length"]), place) for place, row in enumerate(rows))
        except (KeyError, TypeError, ValueError) as error:
            raise TrajectoryError(
                f"The metadata of {self.root} have an episode without a number or length ({type(error).__name__}: "
                f"{error}). Copy them again."
            ) from error
        for place, (index, length, number) in enumerate(numbered):
            row = rows[number]
            if index != place:
                raise TrajectoryError(f"Episode {place} is missing from the metadata of {self.root}. Copy them again.")
            if length < 1:
                raise TrajectoryError(f"Episode {index} of {self.root} has no frames. Remove it.")
            yield Episode(index, start, length, tuple(row.get("tasks") or ()), row)
            start += length

    def _episode_rows(self) -> list[dict[str, Any]]:
        if self.version != "v3.0":
            path = self.root / "meta/episodes.jsonl"
            try:
                return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            except (OSError, ValueError) as error:
                raise TrajectoryError(f"{path} cannot be read: {error}. Copy the data set again.") from error
        rows: list[dict[str, Any]] = []
        for path in sorted((self.root / "meta/episodes").glob("*/*.parquet")):
            names = [name for name in self._file(path).schema_arrow.names if not name.startswith("stats/")]
            rows += self._read(path, names).to_pylist()
        return rows

    @cached_property
    def _by_file(self) -> dict[Path, list[Episode]]:
        files: dict[Path, list[Episode]] = {}
        for episode in self.episodes:
            files.setdefault(self._data_file(episode), []).append(episode)
        return files

    def _data_file(self, episode: Episode) -> Path:
        return self.root / self._data_path.format(**self._places(episode, "data"))

    def _stretch(self, episode: Episode, camera: str) -> _Stretch:
        part = f"videos/{camera}"
        path = self.root / self._video_path.format(video_key=camera, **self._places(episode, part))
        if self.version != "v3.0":
            return _Stretch(path, 0.0)
        try:
            return _Stretch(path, float(episode.record[f"{part}/from_timestamp"]))
        except (KeyError, TypeError) as error:
            raise TrajectoryError(self._unplaced(episode, part)) from error

    def _places(self, episode: Episode, part: str) -> dict[str, int]:
        """What the templates of paths ask for: v3.0 keeps it with the episode, v2.1 counts."""
        if self.version != "v3.0":
            return {"episode_chunk": episode.index // self._chunk_size, "episode_index": episode.index}
        try:
            return {name: int(episode.record[f"{part}/{name}"]) for name in ("chunk_index", "file_index")}
        except (KeyError, TypeError) as error:
            raise TrajectoryError(self._unplaced(episode, part)) from error

    def _unplaced(self, episode: Episode, part: str) -> str:
        return (
            f"The metadata of episode {episode.index} of {self.root} do not say where its {part} are. Copy the data "
            "set again."
        )

    def _picture(self, episode: Episode, index: int, camera: str) -> Image.Image:
        path = self._data_file(episode)
        first_of_file = self._by_file[path][0].start
        row = episode.start + index - first_of_file
        kept = self._pictures
        if kept is None or kept[:2] != (os.getpid(), path) or not kept[2] <= row < kept[2] + len(kept[3]):
            kept = self._pictures = (os.getpid(), path, *self._group(path, row, camera))
        value = kept[3][row - kept[2]]
        data = (value or {}).get("bytes")
        try:
            content = data if data else (self.root / str((value or {}).get("path"))).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                return image.convert("RGB")
        except Exception as error:
            # Damaged data makes decoders raise nearly anything.
            raise TrajectoryError(
                f"The image in {path} cannot be decoded ({type(error).__name__}: {error}). Copy the file again."
            ) from error

    def _group(self, path: Path, row: int, camera: str) -> tuple[int, list[Any]]:
        """First row, and the pictures, of the row group that holds a row."""
        file, first = self._file(path), 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row < first + count:
                return first, file.read_row_group(group, columns=[camera]).column(camera).to_pylist()
            first += count
        raise TrajectoryError(f"{path} has {first} frames, and this would be frame {row}. Copy the file again.")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.root / name
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise TrajectoryError(
                f"There is no {path}, so {self.root} is not a data set of LeRobot. Give the folder that holds 'meta', "
                "'data' and, with cameras, 'videos'."
            ) from error
        except (OSError, ValueError) as error:
            raise TrajectoryError(f"{path} cannot be read: {error}. Copy the data set again.") from error
        if not isinstance(content, dict):
            raise TrajectoryError(f"{path} is damaged: it is no JSON object. Copy the data set again.")
        return content

    def _file(self, path: Path) -> Any:
        parquet = load_parquet()
        try:
            return parquet.ParquetFile(path)
        except FileNotFoundError as error:
            raise TrajectoryError(f"There is no {path}. Copy the data set again.") from error
        except Exception as error:
            # pyarrow has errors of its own, which are not OSErrors.
            raise TrajectoryError(f"{path} cannot be read: {error}. It is damaged: copy the data set again.") from error

    def _read(self, path: Path, columns: list[str]) -> Any:
        file = self._file(path)
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise TrajectoryError(f"{path} has no column {missing[0]!r}. Copy the data set again.")
        try:
            return file.read(columns=columns)
        except Exception as error:
            raise TrajectoryError(f"{path} cannot be read: {error}. It is damaged: copy the data set again.") from error


def held_out(groups: Sequence[str]) -> frozenset[int]:
    """Chooses what is held out of training: every fifth of each group, or the last of a group of two to four.

    Args:
        groups: Group of each recording, in order, such as its task.

    Returns:
        Places of the held-out recordings; none if there is only one recording.
    """
    by_group: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        by_group.setdefault(group, []).append(place)
    chosen = [place for places in by_group.values() for place in (places[4::5] if len(places) > 4 else places[1:][-1:])]
    # Where every task was recorded once, every fifth recording.
    return frozenset(chosen or range(len(groups))[4::5] or range(len(groups))[1:][-1:])


def load_parquet() -> ModuleType:
    """Imports pyarrow's reader of parquet files.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Data sets of LeRobot are read by pyarrow, which is not installed: pip install 'theia[robots]'."
        ) from error
    return cast(ModuleType, pyarrow.parquet)


def _feature(about: Mapping[str, Any]) -> Feature:
    names = about.get("names")
    if isinstance(names, Mapping):  # such as {"motors": [...]}
        names = next((part for part in names.values() if isinstance(part, list)), list(names))
    return Feature(
        str(about["dtype"]), tuple(map(int, about["shape"])), None if names is None else tuple(map(str, names))
    )


def _flat(column: Any, rows: int) -> NDArray[np.float32] | None:
    """Values of a column of numbers or lists of numbers, shape ``(rows, size)``; ``None`` if it holds anything else."""
    values = column.combine_chunks()
    while hasattr(values.type, "value_type"):
        if hasattr(values, "offsets") and len(values) and np.ptp(np.diff(values.offsets.to_numpy())):
            return None
        values = values.flatten()
    try:
        flat = values.to_numpy(zero_copy_only=False).astype(np.float32)
    except (TypeError, ValueError):  # text
        return None
    return flat.reshape(rows, -1) if rows and flat.size % rows == 0 else None
