"""Times contenders in turn on the same machine: ratios of neighbours hold where single figures do not."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from theia.errors import TheiaError

MOST_PAIRS = 10000  # repetitions

Axis = Literal["cpu_s", "wall_s"]


class BenchmarkError(TheiaError):
    """The benchmark cannot go on; the message says why."""


class ParityError(BenchmarkError):
    """Contenders that were to do the same work did not."""


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Attributes:
        wall_s: Seconds on the clock.
        cpu_s: Seconds of processor time of this process and all its children, in user and system mode.
    """

    wall_s: float
    cpu_s: float

    def __truediv__(self, runs: float) -> "Cost":
        return Cost(self.wall_s / runs, self.cpu_s / runs)


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    Attributes:
        name: What is measured, against what.
        values: One per repetition; the table shows median, least and greatest.
        unit: ``"x"`` for a ratio.
        aim: What the project wants to reach, if it set itself an aim.
        at_most: Whether the aim is an upper bound.
    """

    name: str
    values: Sequence[float]
    unit: str = "x"
    aim: float | None = None
    at_most: bool = False

    @property
    def median(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the aim; ``None`` without one."""
        if self.aim is None:
            return None
        return self.median <= self.aim if self.at_most else self.median >= self.aim


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        folder: Empty folder for data; deleted by the caller afterwards.
        pairs: Counted repetitions of each contender.
        small: Sizes for a test of the benchmark itself: its figures mean nothing.
    """

    folder: Path
    pairs: int = 5
    small: bool = False


@dataclass(frozen=True)
class Result:
    """What a suite measured.

    Attributes:
        measures: Lines of the table.
        details: For the JSON: settings of the work, every repetition. Builtins only.
        notes: What a reader of the table must know.
    """

    measures: list[Measure]
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def cost_of(work: Callable[[], object]) -> Cost:
    """Runs some work once. Its worker processes must still be there or be reaped when it returns."""
    # Looking for children takes milliseconds of processor time itself: outside of what is measured.
    children = _children_cpu_s()
    own, wall = time.process_time(), time.perf_counter()
    work()
    wall, own = time.perf_counter() - wall, time.process_time() - own
    return Cost(wall, own + _children_cpu_s() - children)


def interleave(contenders: Mapping[str, Callable[[], object]], pairs: int) -> dict[str, list[Cost]]:
    """Runs all contenders in turn, once unmeasured and then ``pairs`` times, every other round backwards.

    Args:
        contenders: Work by name. What a contender started must be idle when it returns, or it is charged to the next.
        pairs: Counted rounds.

    Returns:
        By name, one cost per round.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for work in contenders.values():
        work()
    for round_ in range(pairs):
        for name in list(contenders)[:: -1 if round_ % 2 else 1]:
            costs[name].append(cost_of(contenders[name]))
    return costs


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    """Work that does the same several times, for what is too short to time alone."""

    def several() -> None:
        for _ in range(times):
            work()

    return several


def ratios(costs: Mapping[str, Sequence[Cost]], slow: str, fast: str, axis: Axis) -> list[float]:
    """How many times as much ``slow`` took as ``fast`` did, round by round."""
    pairs = zip(costs[slow], costs[fast], strict=True)
    return [float(getattr(theirs, axis) / getattr(ours, axis)) for theirs, ours in pairs]


def _children_cpu_s() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # and waited for
    total = ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            # With the children that it waited for in its turn. Rounded to the kernel's ticks of 10 ms.
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return float(total)
