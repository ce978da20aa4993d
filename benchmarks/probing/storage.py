"""Where what is computed once is kept."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Storage:
    """Gives arrays: in memory, or in files of a folder that are mapped into memory.

    Args:
        folder: For the files; ``None`` for memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array whose values are not set."""
        if self._folder is None:
            return np.empty(shape, dtype)
        path = self._folder / f"{next(self._numbers)}.npy"
        array: NDArray[Any] = np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
        return array


@contextmanager
def temporary(on_disk: bool, folder: Path | None) -> Iterator[Storage]:
    """A storage whose files are deleted in the end.

    Args:
        on_disk: Whether to map files; memory otherwise.
        folder: Where to put them; the system's temporary folder by default.
    """
    if not on_disk:
        yield Storage()
        return
    with TemporaryDirectory(prefix="theia-probing-", dir=folder) as files:
        yield Storage(Path(files))
