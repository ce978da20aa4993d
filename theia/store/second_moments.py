"""Covariances of a teacher's channels, from one pass over the stored features that goes on after an interruption."""

import hashlib
import io
import shlex
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.errors import StoreError
from theia.store.components import load_basis
from theia.store.disk import replace_bytes, unreadable
from theia.store.reader import FeatureStore
from theia.store.schema import STATISTICS, TRAIN, canonical_json
from theia.store.sets import SetLayout
from theia.store.shard import Shard

_ROWS_AT_ONCE = 16
_SAVE_EVERY_S = 60.0


@dataclass
class Sums:
    """Sums of tokens and of their products around a centre: a few in float32, theirs in float64.

    Attributes:
        centre: Centre of each channel, float32, shape ``(C,)``; near the mean, so that nothing cancels out.
        sum: Sum of the tokens' distances from it, float64, shape ``(C,)``.
        products: Sum of the products of the distances, float64, shape ``(C, C)``.
        tokens: Number of tokens.
    """

    centre: Tensor
    sum: NDArray[np.float64]
    products: NDArray[np.float64]
    tokens: int = 0

    @classmethod
    def around(cls, centre: Tensor) -> "Sums":
        """Sums of no tokens."""
        return cls(centre, np.zeros(len(centre)), np.zeros((len(centre), len(centre))))

    def add(self, tokens: Tensor) -> None:
        """Adds tokens, float32, shape ``(n, C)``, on the device of the centre."""
        distances = tokens - self.centre
        self.sum += distances.sum(0, dtype=torch.float64).cpu().numpy()
        self.products += (distances.T @ distances).double().cpu().numpy()
        self.tokens += len(tokens)

    def mean(self) -> NDArray[np.float64]:
        """Mean of each channel, shape ``(C,)``."""
        return np.asarray(self.centre.double().cpu().numpy() + self.sum / self.tokens)

    def covariance(self) -> NDArray[np.float64]:
        """Population covariance, shape ``(C, C)``."""
        shift = self.sum / self.tokens
        found = self.products / self.tokens - np.outer(shift, shift)
        found = (found + found.T) / 2
        np.fill_diagonal(found, found.diagonal().clip(min=0))  # rounding may take a dead channel below
        return np.asarray(found)


@dataclass(frozen=True)
class SecondMoments:
    """Mean and covariance of the channels of one teacher's patch tokens over the training split.

    Attributes:
        mean: Mean of each channel, float64, shape ``(C,)``.
        covariance: Population covariance, float64, shape ``(C, C)``.
        tokens: Number of patch tokens behind it.
        images: Number of images behind it.
        features: Digest of the shards that the features lie in.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    tokens: int
    images: int
    features: str

    def variances(self) -> NDArray[np.float64]:
        """Variances along the principal components, descending, shape ``(C,)``."""
        return np.asarray(np.linalg.eigvalsh(self.covariance)[::-1].clip(min=0), np.float64)

    def components_for(self, share: float) -> int:
        """Smallest number of principal components that hold this share of the variance."""
        variances = self.variances()
        held = np.cumsum(variances) / max(float(variances.sum()), np.finfo(np.float64).tiny)
        return min(len(held), int(np.searchsorted(held, share)) + 1)


def path_of(root: Path, teacher: str) -> Path:
    """Path of the covariance of one teacher."""
    return root / STATISTICS / f"{teacher}.covariance.npz"


def load(store: FeatureStore, teacher: str) -> SecondMoments:
    """Reads what :func:`measure` wrote.

    Args:
        store: The store.
        teacher: Name of the teacher.

    Raises:
        StoreError: If there is none, it is damaged, or the features have changed since.
    """
    found = load_kept(store.root, teacher)
    if found is None:
        command = shlex.join(["theia", "store", "statistics", str(store.root)])
        raise StoreError(f"{store.root} has no covariance of {teacher!r}. Run: {command}")
    if found.features != _digest(_layout(store, teacher)):
        path = path_of(store.root, teacher)
        raise StoreError(f"{path} is of other features than the store has now. Delete it and measure again.")
    return found


def load_kept(root: Path, teacher: str) -> SecondMoments | None:
    """Reads what :func:`measure` wrote, whether or not the features are still there; ``None`` if there is nothing.

    Args:
        root: Folder of the store.
        teacher: Name of the teacher.

    Raises:
        StoreError: If it is damaged.
    """
    found = _read(path_of(root, teacher))
    if found is None:
        return None
    return SecondMoments(**{name: found[name] for name in ("mean", "covariance", "tokens", "images", "features")})


def measure(
    store: FeatureStore,
    teacher: str,
    most: int | None,
    device: torch.device,
    advance: Callable[[int], None],
) -> SecondMoments:
    """Computes the covariance of one teacher's channels and writes it beside the other statistics.

    What is there already and belongs to the same features and images is not computed again; an interrupted pass goes
    on at the last whole minute.

    Args:
        store: The store.
        teacher: Name of the teacher.
        most: Number of images, spread evenly over the training split; ``None`` for all.
        device: Device that multiplies.
        advance: Called with the number of images that were done since the last call.

    Raises:
        StoreError: If the training split or its statistics are missing, unfinished or damaged, or the disk is full.
    """
    layout = _layout(store, teacher)
    centre = torch.from_numpy(store.statistics(teacher).mean).float().to(device)
    basis = None if layout.record.basis is None else load_basis(store.root, teacher, layout.record.basis)
    total = sum(record.rows for record in layout.record.shards)
    step = 1 if most is None else max(1, -(-total // most))
    features, target = _digest(layout), path_of(store.root, teacher)
    there = _read(target)
    if there is not None and (there["features"], there["step"]) == (features, step):
        advance(int(there["images"]))
        return load(store, teacher)
    part = target.with_suffix(".unfinished.npz")
    state = _read(part)
    sums = Sums.around(centre)
    images = shards = 0
    if state is not None and (state["features"], state["step"]) == (features, step):
        sums = Sums(centre, state["sum"], state["products"], state["tokens"])
        images, shards = state["images"], state["shards"]
    advance(images)
    first = sum(record.rows for record in layout.record.shards[:shards])
    saved = time.monotonic()
    for record in layout.record.shards[shards:]:
        shard = layout.open(record.index, record)
        rows = np.arange(-first % step, record.rows, step)
        for some in np.array_split(rows, -(-len(rows) // _ROWS_AT_ONCE)) if len(rows) else ():
            tokens = torch.from_numpy(_values(shard, some)).to(device).float()
            sums.add((tokens if basis is None else basis.restore(tokens)).flatten(0, 1))
            images += len(some)
            advance(len(some))
        shards += 1
        first += record.rows
        if time.monotonic() - saved > _SAVE_EVERY_S:
            so_far = {"sum": sums.sum, "products": sums.products, "tokens": sums.tokens}
            _write(part, {"features": features, "step": step, "images": images, "shards": shards, **so_far})
            saved = time.monotonic()
    found = {"mean": sums.mean(), "covariance": sums.covariance(), "tokens": sums.tokens}
    _write(target, {"features": features, "step": step, "images": images, **found})
    part.unlink(missing_ok=True)
    return load(store, teacher)


def count(store: FeatureStore, teacher: str, most: int | None) -> int:
    """Number of images that :func:`measure` takes."""
    total = sum(record.rows for record in _layout(store, teacher).record.shards)
    return total if most is None else -(-total // max(1, -(-total // most)))


def _layout(store: FeatureStore, teacher: str) -> SetLayout:
    store.open_split(TRAIN, teacher)  # every file is there and fits the manifest
    record = store.manifest.splits[TRAIN]
    return SetLayout(store.root, TRAIN, teacher, record.images, record.sets[teacher])


def _digest(layout: SetLayout) -> str:
    return hashlib.sha256(canonical_json([one.sha256 for one in layout.record.shards]).encode()).hexdigest()


def _values(shard: Shard, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Patch tokens of some rows, shape ``(n, N, C)``."""

    def read(name: str) -> NDArray[Any]:
        if rows[-1] - rows[0] + 1 == len(rows):
            return shard.read(name, int(rows[0]), int(rows[-1]) + 1)
        return np.concatenate([shard.read(name, row, row + 1) for row in rows.tolist()])

    values = read("data")
    if "scale" not in shard.datasets:
        return values
    scale = read("scale")
    return np.asarray(values * scale[:, :1] + scale[:, 1:])


def _write(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **state)
    replace_bytes(path, buffer.getvalue())


def _read(path: Path) -> dict[str, Any] | None:
    """What lies in a file; ``None`` if it is not there."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: array if array.ndim else array.item() for name, array in file.items()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} is damaged ({error}). Delete it and measure again.") from error
