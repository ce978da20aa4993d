"""Features stored as their first principal components: a smaller store, from which the channels are restored."""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from theia.errors import StoreError
from theia.store.disk import replace_bytes, unreadable
from theia.store.schema import STATISTICS, BasisRecord

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """The first principal components of one teacher's patch tokens.

    A stored value is a component divided by the deviation along the first one, so that none is beyond float16.

    Attributes:
        mean: Mean of each channel, float32, shape ``(C,)``.
        axes: Directions of the components, orthonormal, float32, shape ``(K, C)``.
        scale: What stored values are multiplied with.
        variances: Variances along all components, descending, float64, shape ``(C,)``.
        images: Number of images that it was computed from.
    """

    mean: NDArray[np.float32]
    axes: NDArray[np.float32]
    scale: float
    variances: NDArray[np.float64]
    images: int

    @classmethod
    def of(cls, mean: NDArray[np.float64], covariance: NDArray[np.float64], components: int, images: int) -> "Basis":
        """The basis that a covariance has.

        Args:
            mean: Mean of each channel, shape ``(C,)``.
            covariance: Covariance, shape ``(C, C)``.
            components: Number of components to keep.
            images: Number of images behind the covariance.
        """
        variances, vectors = np.linalg.eigh(covariance)
        variances = variances[::-1].clip(min=0)
        axes = np.ascontiguousarray(vectors[:, ::-1][:, :components].T.astype(np.float32))
        scale = float(np.sqrt(variances[0])) or 1.0  # a teacher that never moves has no direction
        return cls(mean.astype(np.float32), axes, scale, variances, images)

    @property
    def kept(self) -> float:
        """Share of the variance that the components hold."""
        total = float(self.variances.sum())
        return float(self.variances[: len(self.axes)].sum()) / total if total else 1.0

    @cached_property
    def content(self) -> bytes:
        """Content of its file."""
        buffer = io.BytesIO()
        np.savez(buffer, mean=self.mean, axes=self.axes, scale=self.scale, variances=self.variances, images=self.images)
        return buffer.getvalue()

    @cached_property
    def record(self) -> BasisRecord:
        """What identifies it."""
        return BasisRecord(len(self.axes), hashlib.sha256(self.content).hexdigest())

    def project(self, tokens: "Tensor") -> "Tensor":
        """Components of tokens.

        Args:
            tokens: Floating point, shape ``(..., C)``.

        Returns:
            float32, shape ``(..., K)``.
        """
        mean, axes = self._on(tokens.device)
        found: Tensor = (tokens.float() - mean) @ axes.T / self.scale
        return found

    def restore(self, components: "Tensor") -> "Tensor":
        """Tokens that have these components, and the mean of all others.

        Args:
            components: Floating point, shape ``(..., K)``.

        Returns:
            float32, shape ``(..., C)``.
        """
        import torch  # listing a store does not need it

        mean, axes = self._on(components.device)
        flat = components.float().flatten(0, -2) * self.scale
        return torch.addmm(mean, flat, axes).reshape(*components.shape[:-1], len(mean))

    def _on(self, device: "torch.device") -> "tuple[Tensor, Tensor]":
        """Mean and axes on a device, copied there once."""
        import torch

        if device not in self._copies:
            with torch.inference_mode(False):  # so that they can be used where gradients are wanted, too
                self._copies[device] = torch.from_numpy(self.mean).to(device), torch.from_numpy(self.axes).to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> "dict[torch.device, tuple[Tensor, Tensor]]":
        return {}

    def __getstate__(self) -> dict[str, object]:
        # Copies stay in the process that made them.
        return {name: value for name, value in self.__dict__.items() if name != "_copies"}


def basis_path(root: Path, teacher: str, record: BasisRecord) -> Path:
    """Path of a basis of one teacher. Its digest is in the name: no other extraction can take its place."""
    return root / STATISTICS / f"{teacher}.basis-{record.sha256[:12]}.npz"


def save_basis(root: Path, teacher: str, basis: Basis) -> None:
    """Writes a basis.

    Raises:
        StoreError: If the disk is full.
    """
    path = basis_path(root, teacher, basis.record)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, basis.content)


def load_basis(root: Path, teacher: str, record: BasisRecord) -> Basis:
    """Reads the basis that a set's features were stored in.

    Args:
        root: Folder of the store.
        teacher: Name of the teacher.
        record: What the manifest says of it.

    Raises:
        StoreError: If it is missing, damaged or another one.
    """
    path = basis_path(root, teacher, record)
    lost = (
        "Its features cannot be restored without it: bring it back from a copy, or delete the folders of this teacher "
        "and run the same theia extract."
    )
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise StoreError(f"{path} is damaged (it is not what the manifest says). {lost}")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return Basis(file["mean"], file["axes"], float(file["scale"]), file["variances"], int(file["images"]))
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. {lost}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} is damaged ({error}). {lost}") from error
