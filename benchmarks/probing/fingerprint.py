"""Whether something is the same as in an earlier process."""

import hashlib
import json
from pathlib import Path

import numpy as np

from benchmarks.probing.data import DenseData


def fingerprint(*parts: object) -> str:
    """Letters that differ if one of the parts does: arrays, and what JSON can hold."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def of_data(data: DenseData) -> str:
    """Of all pictures, maps, cameras and pairs."""
    parts: list[object] = [list(data.classes)]
    for split in (data.train, data.val):
        parts += [values for values in (split.images, split.depth, split.normals, split.labels) if values is not None]
        parts += [array for camera in split.cameras or () for array in (camera.intrinsics, camera.to_world)]
        parts.append([list(pair) for pair in split.pairs])
    return fingerprint(*parts)


def of_files(*roots: str | None) -> str:
    """Of names, sizes and times of all files in folders, and of files."""
    every = [path for root in roots if root for path in [Path(root), *sorted(Path(root).rglob("*"))]]
    return fingerprint([[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in every if path.is_file()])
