"""Writes LeRobot's data set folders, v3.0, one episode after another; what is written stays whole at any kill."""

import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from theia.errors import TrajectoryError
from theia.trajectories.lerobot import INFO, load_parquet
from theia.trajectories.video import load_av
from theia.utils.files import replacing, write_whole

Frames = NDArray[np.uint8]
Values = NDArray[np.floating[Any]]

_VERSION = "v3.0"
_CHUNK = 1000  # files in one folder
_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODE = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_QUALITY = "18"  # of x264: no difference is seen
_KEY_FRAMES = "2"  # every second frame, as LeRobot does: any frame is found by decoding two
_BOOKKEEPING = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64",
                "task_index": "int64"}  # fmt: skip
_PICTURES_FOR_STATISTICS = 20  # frames of an episode


class LeRobotWriter:
    """Writes a data set folder that LeRobot itself opens.

    Every episode has files of its own, written before its row in the metadata: an episode whose row is there is whole.
    So a killed recording goes on with the next episode, and several processes may write different episodes.

    Args:
        root: The folder. It may hold episodes of an earlier recording with the same columns.
        frames_per_s: Frame rate of the recording.
        values: Names of the values in each column of numbers, by key (``action``, ``observation.state``).
        cameras: Height and width of the pictures, by key (``observation.images.top``).
        tasks: All tasks of the data set; an episode has one of them.
        pictures: ``video`` for one video of each camera and episode, lossy; ``image`` for PNG files in the tables.
        robot: Type of the robot, for the record.

    Raises:
        TrajectoryError: If the folder holds a data set with other columns, cameras, tasks or frame rate.
        ConfigError: If pyarrow or PyAV is not installed.
    """

    def __init__(
        self,
        root: Path,
        frames_per_s: int,
        values: Mapping[str, Sequence[str]],
        cameras: Mapping[str, tuple[int, int]],
        tasks: Sequence[str],
        pictures: Literal["video", "image"] = "video",
        robot: str | None = None,
    ) -> None:
        self.root, self._pictures, self._tasks = root, pictures, list(tasks)
        self._values = {key: list(names) for key, names in values.items()}
        self._cameras = dict(cameras)
        features: dict[str, Any] = {
            key: {"dtype": "float32", "shape": [len(names)], "names": names} for key, names in self._values.items()
        }
        for key, (height, width) in self._cameras.items():
            features[key] = {"dtype": pictures, "shape": [height, width, 3], "names": ["height", "width", "channels"]}
            if pictures == "video":
                features[key]["info"] = {
                    "video.height": height, "video.width": width, "video.channels": 3, "video.codec": "h264",
                    "video.pix_fmt": "yuv420p", "video.is_depth_map": False, "video.fps": frames_per_s,
                    "has_audio": False,
                }  # fmt: skip
        features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in _BOOKKEEPING.items()}
        self._info: dict[str, Any] = {
            "codebase_version": _VERSION,
            "robot_type": robot,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": frames_per_s,
            "splits": {},
            "data_path": _DATA,
            "video_path": _VIDEO if pictures == "video" and self._cameras else None,
            "features": features,
        }
        self._begin()

    def has(self, index: int) -> bool:
        """Whether an episode is there, whole."""
        return (self.root / _at(_EPISODE, index)).is_file()

    def write(
        self,
        index: int,
        task: str,
        values: Mapping[str, Values],
        pictures: Mapping[str, Frames],
        extra: Mapping[str, str | int | float] | None = None,
    ) -> None:
        """Writes one episode.

        Args:
            index: Number of the episode. The numbers of a finished data set run from 0 without a gap.
            task: One of the tasks.
            values: Values of each column, shape ``(T, size)``.
            pictures: RGB frames of each camera, uint8, shape ``(T, H, W, 3)``.
            extra: Further entries for the episode's row in the metadata, such as a seed.

        Raises:
            TrajectoryError: If columns or cameras differ from those of the data set, their lengths differ, or values
                are not finite.
            FileError: If the disk is full.
        """
        length = self._check(index, task, values, pictures)
        statistics: dict[str, dict[str, Any]] = {key: _statistics(np.asarray(part)) for key, part in values.items()}
        row: dict[str, Any] = {"episode_index": index, "tasks": [task], "length": length}
        row |= {f"data/{name}": place for name, place in _place(index).items()}
        # Where an episode begins among all rows is known when all lengths are; see finish().
        row |= {"dataset_from_index": 0, "dataset_to_index": length}
        for key, frames in pictures.items():
            some = frames[np.linspace(0, length - 1, min(length, _PICTURES_FOR_STATISTICS)).astype(int)]
            by_channel = _statistics(some.reshape(-1, 3) / 255)
            statistics[key] = {
                name: part if name == "count" else np.reshape(part, (3, 1, 1)).tolist()
                for name, part in by_channel.items()
            } | {"count": [len(some)]}
            if self._pictures == "video":
                self._write_video(self.root / _at(_VIDEO, index, video_key=key), frames)
                row |= {f"videos/{key}/{name}": place for name, place in _place(index).items()}
                row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": length / self._info["fps"]}
        self._write_data(index, task, values, pictures, 0)
        row |= {f"meta/episodes/{name}": place for name, place in _place(index).items()}
        row |= {f"stats/{key}/{name}": part for key, parts in statistics.items() for name, part in parts.items()}
        self._write_table(self.root / _at(_EPISODE, index), [{**row, **(extra or {})}])

    def finish(self) -> int:
        """Numbers the rows of all episodes and writes the metadata; then LeRobot can open the folder.

        Files that would stay the same are not touched, so that a data set which is finished once more stays the same to
        whoever knows it by the times of its files.

        Returns:
            Number of episodes.

        Raises:
            TrajectoryError: If there is no episode, or one is missing in between.
        """
        parquet = load_parquet()
        rows = []
        for path in sorted((self.root / "meta/episodes").glob("*/*.parquet")):
            rows += parquet.read_table(path).to_pylist()
        rows.sort(key=lambda row: int(row["episode_index"]))
        if not rows:
            raise TrajectoryError(f"No episode was written to {self.root}. Record one.")
        missing = set(range(len(rows))) - {row["episode_index"] for row in rows}
        if missing:
            raise TrajectoryError(f"Episode {min(missing)} of {self.root} is missing. Record it, then finish again.")
        start = 0
        for row in rows:
            index, stop = row["episode_index"], start + row["length"]
            if (row["dataset_from_index"], row["dataset_to_index"]) != (start, stop):
                self._renumber(index, start)
                self._write_table(
                    self.root / _at(_EPISODE, index), [row | {"dataset_from_index": start, "dataset_to_index": stop}]
                )
            start = stop
        of_tasks = self.root / "meta/tasks.parquet"
        if not of_tasks.exists():  # they never change
            table = [{"task_index": number, "task": task} for number, task in enumerate(self._tasks)]
            self._write_table(of_tasks, table, index="task")
        statistics = {key: _merged(rows, key) for key in (*self._values, *self._cameras)}
        _write_new(self.root / "meta/stats.json", json.dumps(statistics, indent=2))
        info = self._info | {
            "total_episodes": len(rows), "total_frames": start, "splits": {"train": f"0:{len(rows)}"},
        }  # fmt: skip
        _write_new(self.root / INFO, json.dumps(info, indent=2))
        return len(rows)

    def _begin(self) -> None:
        load_parquet()
        if self._pictures == "video" and self._cameras:
            load_av()
        path, of_tasks = self.root / INFO, self.root / "meta/tasks.json"
        if not path.exists():
            # A recording that was killed while it began has left the list of tasks at most.
            left = {of_tasks.parent, of_tasks, *of_tasks.parent.glob(f".{of_tasks.name}~*")}
            left |= set(path.parent.glob(f".{path.name}~*"))
            if any(one not in left for one in self.root.rglob("*")):
                raise TrajectoryError(f"{self.root} is not empty and holds no data set. Give an empty or new folder.")
            write_whole(of_tasks, json.dumps(self._tasks))
            write_whole(path, json.dumps(self._info, indent=2))
            return
        try:
            there = json.loads(path.read_text())
            tasks = json.loads(of_tasks.read_text())
        except (OSError, ValueError) as error:
            raise TrajectoryError(
                f"{self.root} holds a data set that was not begun here ({error}), so it cannot be continued. Give a "
                "new folder."
            ) from error
        fixed = ("codebase_version", "fps", "features", "video_path")
        different = [name for name in fixed if there.get(name) != self._info[name]] + ["tasks"] * (tasks != self._tasks)
        if different:
            raise TrajectoryError(
                f"{self.root} holds a data set with other {' and '.join(different)}. Give a new folder, or the options "
                "that it was begun with."
            )

    def _check(self, index: int, task: str, values: Mapping[str, Values], pictures: Mapping[str, Frames]) -> int:
        if task not in self._tasks:
            raise TrajectoryError(f"{task!r} is not a task of {self.root}. It has: {', '.join(self._tasks)}.")
        if set(values) != set(self._values) or set(pictures) != set(self._cameras):
            raise TrajectoryError(
                f"Episode {index} has the columns {sorted([*values, *pictures])}, but {self.root} has "
                f"{sorted([*self._values, *self._cameras])}. Give all of them."
            )
        lengths = {key: len(part) for key, part in (*values.items(), *pictures.items())}
        if len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise TrajectoryError(f"Episode {index} has columns of different or no length: {lengths}. Record it again.")
        for key, part in values.items():
            if np.shape(part)[1:] != (len(self._values[key]),):
                raise TrajectoryError(
                    f"{key!r} of episode {index} has the shape {np.shape(part)}; the data set has "
                    f"{len(self._values[key])} values a frame."
                )
            if not np.isfinite(part).all():
                raise TrajectoryError(f"{key!r} of episode {index} has values that are not finite. Record it again.")
        for key, frames in pictures.items():
            if frames.shape[1:] != (*self._cameras[key], 3) or frames.dtype != np.uint8:
                raise TrajectoryError(
                    f"{key!r} of episode {index} is {frames.dtype} of shape {frames.shape}; the data set has uint8 of "
                    f"shape (T, {self._cameras[key][0]}, {self._cameras[key][1]}, 3)."
                )
        return min(lengths.values())

    def _write_data(
        self, index: int, task: str, values: Mapping[str, Values], pictures: Mapping[str, Frames], start: int
    ) -> None:
        import pyarrow

        length = len(next(iter((*values.values(), *pictures.values()))))
        columns: dict[str, Any] = {
            key: pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array(np.ascontiguousarray(part, np.float32).reshape(-1)), len(self._values[key])
            )
            if len(self._values[key]) > 1
            else pyarrow.array(np.asarray(part, np.float32).reshape(-1))
            for key, part in values.items()
        }
        if self._pictures == "image":
            for key, frames in pictures.items():
                columns[key] = pyarrow.array(
                    [{"bytes": _png(frame), "path": None} for frame in frames], _picture_type()
                )
        numbers = np.arange(length)
        columns |= {
            "timestamp": pyarrow.array((numbers / self._info["fps"]).astype(np.float32)),
            "frame_index": pyarrow.array(numbers),
            "episode_index": pyarrow.array(np.full(length, index)),
            "index": pyarrow.array(numbers + start),
            "task_index": pyarrow.array(np.full(length, self._tasks.index(task))),
        }
        path = self.root / _at(_DATA, index)
        with replacing(path) as temporary:
            load_parquet().write_table(pyarrow.table(columns), temporary)

    def _renumber(self, index: int, start: int) -> None:
        import pyarrow

        parquet = load_parquet()
        path = self.root / _at(_DATA, index)
        table = parquet.read_table(path)
        column = pyarrow.array(np.arange(start, start + len(table)))
        with replacing(path) as temporary:
            parquet.write_table(table.set_column(table.schema.get_field_index("index"), "index", column), temporary)

    def _write_table(self, path: Path, rows: list[dict[str, Any]], index: str | None = None) -> None:
        import pyarrow

        table = pyarrow.Table.from_pylist(rows)
        if index is not None:
            # LeRobot finds a task by the index that pandas keeps in the file's metadata.
            columns = [
                {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
                for name, kind, dtype in (("task_index", "int64", "int64"), (index, "unicode", "object"))
            ]
            about = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.2.3"}
            table = table.replace_schema_metadata({"pandas": json.dumps(about)})
        with replacing(path) as temporary:
            load_parquet().write_table(table, temporary)

    def _write_video(self, path: Path, frames: Frames) -> None:
        av = load_av()
        options = {"crf": _QUALITY, "g": _KEY_FRAMES, "bf": "0", "preset": "veryfast"}
        with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(self._info["fps"]), options=options)
            stream.pix_fmt = "yuv420p"
            stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


def _write_new(path: Path, content: str) -> None:
    """Writes a small file, unless it holds just that."""
    if not path.exists() or path.read_text() != content:
        write_whole(path, content)


def _picture_type() -> Any:
    import pyarrow

    return pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def _place(index: int) -> dict[str, int]:
    return {"chunk_index": index // _CHUNK, "file_index": index % _CHUNK}


def _at(template: str, index: int, **names: str) -> str:
    return template.format(**_place(index), **names)


def _png(frame: Frames) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def _statistics(values: NDArray[Any]) -> dict[str, list[Any]]:
    """Statistics of each value over the frames, as LeRobot's ``stats.json`` names them."""
    return {
        "min": values.min(0).astype(float).tolist(),
        "max": values.max(0).astype(float).tolist(),
        "mean": values.mean(0, dtype=np.float64).tolist(),
        "std": values.std(0, dtype=np.float64).tolist(),
        "count": [len(values)],
    }


def _merged(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Statistics of all episodes from those of each."""
    parts = {
        name: np.array([row[f"stats/{key}/{name}"] for row in rows], np.float64)
        for name in _statistics(np.ones((1, 1)))
    }
    counts = parts["count"].reshape(-1, *[1] * (parts["mean"].ndim - 1))
    total = counts.sum()
    mean = (counts * parts["mean"]).sum(0) / total
    variance = (counts * (parts["std"] ** 2 + (parts["mean"] - mean) ** 2)).sum(0) / total
    return {
        "min": parts["min"].min(0).tolist(),
        "max": parts["max"].max(0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(total)],
    }
