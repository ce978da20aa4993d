"""What a run has found of each encoder is kept until the run ends, so that an interrupted one goes on."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.probing.probes import Probed
from theia.utils.files import remove_stale, replacing


class Unfinished:
    """Finished encoders of an unfinished run, a file each.

    Args:
        folder: For the files; made and removed as needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, identity: str) -> Probed | None:
        """What was kept, if it was."""
        path = self._path(identity)
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            maps = {name.removeprefix("maps/"): file[name] for name in file.files if name != "figures"}
            return Probed(json.loads(str(file["figures"])), maps)

    def keep(self, identity: str, probed: Probed) -> None:
        """Writes a file, whole or not at all."""
        maps = {f"maps/{name}": values for name, values in probed.maps.items()}
        with replacing(self._path(identity)) as temporary, temporary.open("wb") as file:
            np.savez(file, figures=np.array(json.dumps(probed.figures)), **maps)  # type: ignore[arg-type]

    def forget(self, identities: Iterable[str]) -> None:
        """Deletes files; and the folder, if nothing else is in it."""
        for identity in identities:
            self._path(identity).unlink(missing_ok=True)
        remove_stale(self._folder)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _path(self, identity: str) -> Path:
        return self._folder / f"{identity}.npz"
