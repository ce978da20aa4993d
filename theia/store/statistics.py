"""Mean and standard deviation per channel, from sums that can be merged over shards."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theia.errors import StoreError
from theia.store.disk import replace_bytes, unreadable

Vector = NDArray[np.float64]

STD_FLOOR = 1e-6
"""Smallest standard deviation: a channel that never moves must not be divided by zero."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens, per channel, in float64.

    float16 values and their squares are multiples of a power of two. So float64 holds the sums of a channel that hardly
    moves without rounding, and ``E[x^2] - E[x]^2`` loses nothing where that would be dangerous.

    Attributes:
        sum: Sum of the values, shape ``(C,)``.
        sumsq: Sum of their squares, shape ``(C,)``.
        count: Number of tokens.
    """

    sum: Vector
    sumsq: Vector
    count: int

    @classmethod
    def zero(cls, channels: int) -> "Moments":
        """Moments of no tokens."""
        return cls(np.zeros(channels), np.zeros(channels), 0)

    @classmethod
    def of(cls, values: NDArray[Any]) -> "Moments":
        """Moments of the given values, shape ``(..., C)``."""
        tokens = values.reshape(-1, values.shape[-1]).astype(np.float64, copy=False)
        return cls(tokens.sum(0), np.einsum("nc,nc->c", tokens, tokens), len(tokens))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.sum + other.sum, self.sumsq + other.sumsq, self.count + other.count)

    def mean(self) -> Vector:
        """Mean of each channel, shape ``(C,)``."""
        return self.sum / self.count

    def std(self) -> Vector:
        """Population standard deviation of each channel, shape ``(C,)``."""
        variance: Vector = self.sumsq / self.count - self.mean() ** 2
        return np.sqrt(np.maximum(variance, 0.0))


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation that normalise the features of one teacher.

    Attributes:
        mean: Mean of each channel of the patch tokens, float64, shape ``(C,)``.
        std: Population standard deviation, same shape, never below ``STD_FLOOR``.
        count: Number of patch tokens behind the statistics.
        cls_mean: Mean of each channel of the CLS token; ``None`` for a teacher without one.
        cls_std: Standard deviation of each channel of the CLS token; ``None`` for a teacher without one.
        floored: Number of standard deviations that were replaced by ``STD_FLOOR``.
    """

    mean: Vector
    std: Vector
    count: int
    cls_mean: Vector | None = None
    cls_std: Vector | None = None
    floored: int = 0

    @classmethod
    def from_moments(cls, patches: Moments, cls_token: Moments | None = None) -> "ChannelStatistics":
        """Computes the statistics from sums over all tokens.

        Args:
            patches: Sums over patch tokens.
            cls_token: Sums over CLS tokens, for a teacher that gives them.
        """
        std = patches.std()
        cls_std = None if cls_token is None else cls_token.std()
        floored = int((std < STD_FLOOR).sum()) + (0 if cls_std is None else int((cls_std < STD_FLOOR).sum()))
        return cls(
            mean=patches.mean(),
            std=np.maximum(std, STD_FLOOR),
            count=patches.count,
            cls_mean=None if cls_token is None else cls_token.mean(),
            cls_std=None if cls_std is None else np.maximum(cls_std, STD_FLOOR),
            floored=floored,
        )

    def save(self, path: Path) -> None:
        """Writes an ``.npz`` file atomically.

        Raises:
            StoreError: If the file cannot be written.
        """
        arrays: dict[str, Any] = {"mean": self.mean, "std": self.std, "count": self.count}
        if self.cls_mean is not None and self.cls_std is not None:
            arrays |= {"cls_mean": self.cls_mean, "cls_std": self.cls_std}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, std_floor=STD_FLOOR, floored=self.floored)
        replace_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "ChannelStatistics":
        """Reads a file that :meth:`save` wrote.

        Raises:
            StoreError: If the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(
                    mean=file["mean"],
                    std=file["std"],
                    count=int(file["count"]),
                    cls_mean=file.get("cls_mean"),
                    cls_std=file.get("cls_std"),
                    floored=int(file["floored"]),
                )
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing. Run the theia extract of the training split again.") from error
        except OSError as error:
            raise unreadable(path, error) from error
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(
                f"{path} is damaged ({error}). Delete it and run the theia extract of the training split again."
            ) from error
