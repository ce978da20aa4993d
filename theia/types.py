"""Plain records that pass between the rooms: no behaviour, nothing that knows a file format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a store is described without torch, which takes seconds to import
    from torch import Tensor

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """What a teacher is and what it gives: recorded with every feature that it computes.

    Attributes:
        name: Name of its entry point; also its folder in a store and its key in every dictionary.
        channels: Width ``C`` of a patch token.
        grid_hw: Rows and columns of patch tokens, ``N = H * W``.
        licence: Licence of the weights, as an SPDX id or in a few words.
        weights: Hub id, local path, ``"random"``, or ``"none"`` for a teacher that has none.
        revision: Which weights exactly: a commit, a digest of the file, or a seed.
        has_cls: Whether it gives a CLS token of the same width.
        preprocessing: Everything that turns the uint8 image into its input, as plain values.
    """

    name: str
    channels: int
    grid_hw: tuple[int, int]
    licence: str
    weights: str
    revision: str | None = None
    has_cls: bool = False
    preprocessing: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherFeatures:
    """What a teacher gives for a batch.

    Attributes:
        patches: Spatial tokens, row by row, shape ``(B, N, C)``, floating point, not normalised.
        cls: CLS token, shape ``(B, C)``, or ``None``.
    """

    patches: "Tensor"
    cls: "Tensor | None" = None


@dataclass(frozen=True)
class Depth:
    """What a teacher sees as near and far.

    Attributes:
        maps: Floating point, shape ``(B, H, W)``, finite, in the teacher's own unit; only known up to scale
            and shift.
    """

    maps: "Tensor"


@dataclass(frozen=True)
class Masks:
    """What a teacher sees as things; each list has one entry per image.

    Attributes:
        masks: bool, shape ``(M, H, W)``, overlapping or not, as many as there are. They may be smaller or larger than
            the image, which they cover.
        scores: How sure the teacher is of each, shape ``(M,)``.
    """

    masks: "list[Tensor]"
    scores: "list[Tensor]"


@dataclass(frozen=True)
class Pictures:
    """What a teacher shows in colours of its own.

    Attributes:
        pixels: RGB, uint8, shape ``(B, H, W, 3)``.
    """

    pixels: "Tensor"


# What features look like to a person, of any resolution; always the same one for images of one size.
Decoded = Depth | Masks | Pictures


@dataclass(frozen=True)
class FeatureBatch:
    """One batch of images with the features of several teachers.

    Attributes:
        images: uint8, shape ``(B, 3, H, W)``.
        patches: By teacher name, raw spatial tokens ``(B, N, C)``, floating point or int8.
        scales: By teacher name, for int8 features only: float32 ``(B, 2, C)``, step and middle of each channel of each
            image; a value is ``int8 * step + middle``.
        cls: By teacher name, raw CLS tokens ``(B, C)``, floating point; teachers without one are absent.
        labels: Class indices, int64 ``(B,)``, or ``None``.
        rows: Number of each sample, int64 ``(B,)``, always on the CPU; in a store, its row in the split.
    """

    images: "Tensor"
    patches: "dict[str, Tensor]"
    scales: "dict[str, Tensor]" = field(default_factory=dict)
    cls: "dict[str, Tensor]" = field(default_factory=dict)
    labels: "Tensor | None" = None
    rows: "Tensor | None" = None


class FeatureStatistics(Protocol):
    """What a teacher's features are normalised with, each of shape ``(C,)``, over the training split."""

    @property
    def mean(self) -> Any:
        """Mean of each channel of the patch tokens."""

    @property
    def std(self) -> Any:
        """Standard deviation of each channel of the patch tokens, never zero."""

    @property
    def cls_mean(self) -> Any:
        """Mean of each channel of the CLS token; ``None`` for a teacher without one."""

    @property
    def cls_std(self) -> Any:
        """Standard deviation of each channel of the CLS token; ``None`` for a teacher without one."""
