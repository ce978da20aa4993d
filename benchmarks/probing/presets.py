"""How much work a probe is."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.probing.heads import Fit
from benchmarks.probing.linear import Schedule

Preset = Literal["small", "full"]


@dataclass(frozen=True)
class Effort:
    """All that a preset decides.

    Attributes:
        probe: Of classes: MAE's, or logistic regression for ``None``.
        head: Of pixels.
        rooms: Of rendered scenes, to fit and to test on.
        on_disk: Whether what is computed once lies in files, mapped into memory.
    """

    probe: Schedule | None
    head: Fit
    rooms: tuple[int, int]
    on_disk: bool


PRESETS: dict[Preset, Effort] = {
    "small": Effort(
        # On few images MAE's probe ends before it has converged, and so ranks encoders by how fast they are learned.
        probe=None,
        head=Fit(epochs=20, warmup=2, batch_size=8, learning_rate=5e-3),
        rooms=(16, 6),
        on_disk=False,
    ),
    # MAE's and probe3D's.
    "full": Effort(
        probe=Schedule(batch_size=16384, base_rate=0.1),
        head=Fit(epochs=10, warmup=1.5, batch_size=8, learning_rate=5e-4),
        rooms=(400, 50),
        on_disk=True,
    ),
}
