"""Image sets of Hugging Face: folders of parquet files, and sets that the package ``datasets`` fetches from the hub."""

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from PIL import Image

from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError, decode, read_image
from theia.types import Json

HUB = "hf"
PARQUET_ENDING = ".parquet"

# Words in file names that say which split they are of, by the name of the split here.
_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_LABEL = "label"
_ImageColumn = Literal["struct", "bytes"]


class ParquetSource:
    """Images in parquet files, file by file, in the order within each.

    A row's image is a struct of ``bytes`` and ``path``, as the package ``datasets`` writes it, or bytes alone. One row
    group is held in memory by each process that reads.

    Args:
        root: Folder of the files.
        names: Paths of the files relative to it; the sample id is ``<file without its ending>/row-<number>``.
        column: Name of the column with images; by default the only one.
        labels: Whether to read the integers in the column ``label``.

    Raises:
        ImageError: If a file is damaged, no column or several hold images, or labels are asked for and missing.
        ConfigError: If pyarrow is not installed.
    """

    def __init__(self, root: Path, names: Sequence[str], column: str | None, labels: bool) -> None:
        self._root, self._names, self._column = root, list(names), ""
        self.ids: list[str] = []
        self.labels: list[int] | None = [] if labels else None
        self.classes: list[str] | None = None
        places: list[tuple[int, int, int]] = []
        for number, name in enumerate(self._names):
            file = self._open(number)
            schema = file.schema_arrow
            found = _image_column(root / name, schema, column)
            if number and found != self._column:
                raise ImageError(f"The images of {root / name} are in {found!r}, those before in {self._column!r}.")
            self._column = found
            if self.labels is not None:
                self._add_labels(root / name, file)
            row = 0
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                places += ((number, group, offset) for offset in range(rows))
                stem = name.removesuffix(PARQUET_ENDING)
                self.ids += (f"{stem}/row-{row + offset:06d}" for offset in range(rows))
                row += rows
        self.description: dict[str, Json] = {
            "kind": "parquet", "files": len(self._names), "column": self._column,
        }  # fmt: skip
        # An array instead of a million tuples, because worker processes get a copy.
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self._group: tuple[tuple[int, int], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}

    def read(self, index: int) -> Image.Image:
        """Decodes one image; RGB.

        Raises:
            UnreadableImageError: If the row holds no image, or one that cannot be decoded.
            ImageError: If the file cannot be read.
        """
        number, group, offset = self._places[index].tolist()
        held = self._group
        if held is None or held[0] != (number, group):
            file = self._open(number)
            try:
                rows = file.read_row_group(group, columns=[self._column]).column(0)
            except _errors() as error:
                raise _damaged(self._root / self._names[number], error) from error
            self._group = held = ((number, group), rows)
        return _decode(held[1][offset].as_py(), self._root)

    def _open(self, number: int) -> Any:
        path = self._root / self._names[number]
        try:
            return _pyarrow().ParquetFile(path)
        except _errors() as error:
            raise _damaged(path, error) from error

    def _add_labels(self, path: Path, file: Any) -> None:
        if _LABEL not in file.schema_arrow.names:
            raise ImageError(
                f"Labels were asked for, but {path} has no column {_LABEL!r}. It has: "
                f"{', '.join(file.schema_arrow.names)}. Extract without labels."
            )
        try:
            values = file.read(columns=[_LABEL]).column(0).to_pylist()
        except _errors() as error:
            raise _damaged(path, error) from error
        self.labels = (self.labels or []) + _checked_labels(values, str(path))
        self.classes = _class_names(file.schema_arrow.metadata)


class HubSource:
    """Images of a set on the Hugging Face hub, fetched by the package ``datasets`` into its own cache.

    Args:
        place: ``OWNER/NAME``, ``OWNER/NAME:SPLIT``, or a folder of parquet files in place of ``OWNER/NAME``; and
            ``#COLUMN`` after that of a set with several columns of images.
        split: Split that is taken if the place names none; ``val`` stands for ``validation`` too.
        labels: Whether to read the integers in the column ``label``.

    Raises:
        ImageError: If there is no such set, it asks for consent, it cannot be fetched, or it holds no images or labels.
        ConfigError: If ``datasets`` is not installed.
    """

    def __init__(self, place: str, split: str, labels: bool) -> None:
        place, _, column = place.partition("#")
        name, _, part = place.partition(":")
        self._rows = _fetch(name, part, split)
        features: Mapping[str, Any] = self._rows.features
        typed = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
        # Files that the package datasets did not write do not say that their bytes are images.
        images = typed or [key for key, feature in features.items() if _holds_bytes(feature)]
        self._column = _chosen(f"The set {name}", images, list(features), column or None)
        image = importlib.import_module("datasets").Image(decode=False)
        self._rows = self._rows.cast_column(self._column, image)
        self.ids: Sequence[str] = [f"row-{row:09d}" for row in range(len(self._rows))]
        self.labels: Sequence[int] | None = None
        self.classes: list[str] | None = None
        if labels:
            if _LABEL not in features:
                raise ImageError(
                    f"Labels were asked for, but the set {name} has no column {_LABEL!r}. It has: "
                    f"{', '.join(features)}. Extract without labels."
                )
            self.labels = _checked_labels(list(self._rows[_LABEL]), f"the set {name}")
            self.classes = list(getattr(features[_LABEL], "names", None) or []) or None
        self.description: dict[str, Json] = {
            "kind": HUB, "name": Path(name).resolve().name if Path(name).is_dir() else name,
            "part": str(self._rows.split), "column": self._column,
        }  # fmt: skip

    def read(self, index: int) -> Image.Image:
        """Decodes one image; RGB.

        Raises:
            UnreadableImageError: If the row holds no image, or one that cannot be decoded.
            ImageError: If the cache cannot be read.
        """
        try:
            value = self._rows[index][self._column]
        except OSError as error:
            raise ImageError(f"The cache of datasets cannot be read: {error}. Run the same command again.") from error
        return _decode(value, Path())


def parquet_of_split(names: Sequence[str], split: str, root: Path) -> list[str]:
    """Chooses the files of one split by the words in their names, such as ``train-00000-of-00294.parquet``.

    Args:
        names: Paths of parquet files.
        split: Name of the split.
        root: Folder of the files, for the message.

    Returns:
        Files of the split; all files if no name says of which split it is.

    Raises:
        ImageError: If every name says of which split it is, and none is of this one.
    """
    words = {word: known for known, some in _WORDS.items() for word in some} | {split: split}
    found: dict[str, list[str]] = {}
    for name in names:
        parts = re.split(r"[^a-z0-9]+", name.lower())
        of = next((words[part] for part in parts if part in words), "")
        found.setdefault(of, []).append(name)
    if list(found) == [""]:
        return list(names)
    wanted = words.get(split, split)
    if wanted not in found:
        others = ", ".join(f"{of or 'no split'} ({len(some)})" for of, some in found.items())
        raise ImageError(
            f"No parquet file in {root} is named after the split {split!r}. There are files of: {others}. Name another "
            "split with --split, or give the folder that holds its files alone."
        )
    return found[wanted]


def _fetch(name: str, part: str, split: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"{HUB}:{name} is fetched by the package datasets, which is not installed: pip install 'theia[datasets]'. "
            "Parquet files that are already here can be read without: give their folder."
        ) from error
    parts = [part] if part else [split, *(word for word in _WORDS.get(split, ()) if word != split)]
    try:
        there = datasets.get_dataset_split_names(name)
        chosen = next((word for word in parts if word in there), None)
        if chosen is None:
            raise ImageError(
                f"The set {name} has no split {parts[0]!r}. It has: {', '.join(there)}. Name one of them: "
                f"{HUB}:{name}:{there[0]}"
            )
        return datasets.load_dataset(name, split=chosen)
    except ImageError:
        raise
    except Exception as error:
        # datasets, huggingface_hub and whatever they read with have errors of every kind.
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ImageError(
            f"The set {name} cannot be had from the hub ({type(error).__name__}: {said[0]}). If it asks for consent, "
            "accept its terms on its page and run 'hf auth login'. If this machine has no network, copy its parquet "
            "files here and give their folder."
        ) from error


def _image_column(path: Path, schema: Any, column: str | None) -> str:
    found = _pyarrow_types()
    images = []
    for field in schema:
        is_struct = found.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if is_struct or found.is_binary(field.type) or found.is_large_binary(field.type):
            images.append(field.name)
    return _chosen(str(path), images, schema.names, column)


def _chosen(of: str, images: Sequence[str], columns: Sequence[str], column: str | None) -> str:
    if column is not None and column in images:
        return column
    if not images or column is not None:
        what = f"no images in a column {column!r}" if column is not None else "no column of images"
        raise ImageError(
            f"{of} has {what}. An image is a struct of bytes and path, or bytes. Columns: {', '.join(columns)}."
        )
    if len(images) > 1:
        raise ImageError(f"{of} has images in {', '.join(images)}. Name one of them: PLACE#{images[0]}")
    return images[0]


def _decode(value: Any, root: Path) -> Image.Image:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return read_image(root / value["path"])
        value = value.get("bytes")
    if value is None:
        raise UnreadableImageError("the row holds no image")
    return decode(value)


def _holds_bytes(feature: Any) -> bool:
    value = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(value, "dtype", None) in ("binary", "large_binary")


def _checked_labels(values: Sequence[Any], of: str) -> list[int]:
    for row, value in enumerate(values):
        if not isinstance(value, int) or value < 0:
            raise ImageError(
                f"Labels were asked for, but the label of row {row} in {of} is {value!r}, and not an integer from 0. "
                "Extract without labels."
            )
    return list(values)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> list[str] | None:
    """Names of the classes, which ``datasets`` keeps in the metadata of a file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[_LABEL]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _damaged(path: Path, error: BaseException) -> ImageError:
    return ImageError(f"{path} cannot be read as parquet: {error}. Copy it again, or remove it.")


def _pyarrow() -> ModuleType:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "Parquet files are read by pyarrow, which is not installed: pip install 'theia[datasets]'."
        ) from error


def _pyarrow_types() -> ModuleType:
    return importlib.import_module("pyarrow.types")


def _errors() -> tuple[type[BaseException], ...]:
    # pyarrow has errors of its own, which are not OSErrors.
    return (OSError, importlib.import_module("pyarrow").ArrowException)
