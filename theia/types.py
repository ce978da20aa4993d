"""Plain records that are passed between packages. They have no behaviour and know no file format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # so that a store can be described without torch, which takes seconds to import
    from torch import Tensor

# Arithmetic of a teacher: float32; float32 whose products may be in TF32 on a GPU; bfloat16 autocast.
Precision = Literal["32-true", "tf32", "bf16-mixed"]

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Description of a teacher and its features, recorded with every feature that it computes.

    Attributes:
        name: Name of the teacher's entry point, of its folder in a store, and of its key in every dictionary.
        channels: Width ``C`` of a patch token.
        grid_hw: Number of rows and columns of patch tokens, ``N = H * W``.
        licence: Licence of the weights, as an SPDX id or in a few words.
        weights: Hub id, local path, ``"random"``, or ``"none"`` for a teacher that has none.
        revision: Exact version of the weights: a commit, a digest of the file, or a seed.
        has_cls: Whether the teacher gives a CLS token, also of width ``C``.
        preprocessing: Every step that turns the uint8 image into the teacher's input, as plain values.
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
    """Features of one batch from one teacher.

    Attributes:
        patches: Spatial tokens, row by row, shape ``(B, N, C)``, floating point, not normalised.
        cls: CLS token, shape ``(B, C)``, or ``None``.
    """

    patches: "Tensor"
    cls: "Tensor | None" = None


@dataclass(frozen=True)
class Depth:
    """Depth maps computed from a teacher's features.

    Attributes:
        maps: Depth maps, floating point, shape ``(B, H, W)``, finite, in the teacher's own unit, known only up to scale
            and shift.
    """

    maps: "Tensor"


@dataclass(frozen=True)
class Masks:
    """Object masks computed from a teacher's features. Each list has one entry per image.

    Attributes:
        masks: Masks of each image, bool, shape ``(M, H, W)``, overlapping or not; ``M`` may differ between images. They
            cover the whole image, at a resolution that may be lower or higher.
        scores: Confidence of the teacher in each mask, shape ``(M,)``.
    """

    masks: "list[Tensor]"
    scores: "list[Tensor]"


@dataclass(frozen=True)
class Pictures:
    """Pictures of a teacher's features, in colours of its own.

    Attributes:
        pixels: RGB pixels, uint8, shape ``(B, H, W, 3)``.
    """

    pixels: "Tensor"


# Features in a form for people to look at, at any resolution that is the same for all images of one size.
Decoded = Depth | Masks | Pictures


@dataclass(frozen=True)
class FeatureBatch:
    """One batch of images with the features of several teachers.

    Attributes:
        images: Images, uint8, shape ``(B, 3, H, W)``.
        patches: Raw spatial tokens by teacher name, floating point or int8, shape ``(B, N, C)``. In training, the
            teachers that are absent are left out of the step.
        scales: Step and middle of each channel of each image by teacher name, for int8 features only: float32, shape
            ``(B, 2, C)``. A value is ``int8 * step + middle``.
        cls: Raw CLS tokens by teacher name, floating point, shape ``(B, C)``. Teachers without a CLS token are absent.
        labels: Class indices, int64, shape ``(B,)``, or ``None``.
        rows: Number of each sample, int64, shape ``(B,)``, always on the CPU. In a store, it is the sample's row in the
            split.
    """

    images: "Tensor"
    patches: "dict[str, Tensor]"
    scales: "dict[str, Tensor]" = field(default_factory=dict)
    cls: "dict[str, Tensor]" = field(default_factory=dict)
    labels: "Tensor | None" = None
    rows: "Tensor | None" = None


class FeatureStatistics(Protocol):
    """Statistics that normalise a teacher's features, over the training split. Each has shape ``(C,)``."""

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
