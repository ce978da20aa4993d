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
    """Cost of one run.

    Attributes:
        wall_s: Time on the clock, in seconds.
        cpu_s: Processor time, in seconds, of this process and all its children, in user and system mode.
    """

    wall_s: float
    cpu_s: float

    def __truediv__(self, runs: float) -> "Cost":
        return Cost(self.wall_s / runs, self.cpu_s / runs)


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    Attributes:
        name: Description of what is measured, and against what.
        values: Values, one per repetition; the table shows their median, least and greatest.
        unit: Unit of the values; ``"x"`` for a ratio.
        aim: Value that the project wants to reach, if any.
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
        folder: Empty folder for data, which the caller deletes afterwards.
        pairs: Number of counted repetitions of each contender.
        small: Whether to use tiny sizes, for a test of the benchmark itself; the figures then mean nothing.
    """

    folder: Path
    pairs: int = 5
    small: bool = False


@dataclass(frozen=True)
class Result:
    """What a suite measured.

    Attributes:
        measures: Lines of the table.
        details: Settings of the work and every repetition, for the JSON, as plain values.
        notes: Notes for a reader of the table.
    """

    measures: list[Measure]
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def cost_of(work: Callable[[], object]) -> Cost:
    """Runs some work once. When it returns, its worker processes must be alive still, or reaped."""
    # Outside of the measured time: looking for children itself takes milliseconds.
    children = _children_cpu_s()
    own, wall = time.process_time(), time.perf_counter()
    work()
    wall, own = time.perf_counter() - wall, time.process_time() - own
    return Cost(wall, own + _children_cpu_s() - children)


def interleave(
    contenders: Mapping[str, Callable[[], object]], pairs: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[Cost]]:
    """Runs all contenders in turn, once unmeasured and then ``pairs`` times, every other round backwards.

    Args:
        contenders: Work by name. What a contender started must be idle when it returns, or it is charged to the next.
        pairs: Number of counted rounds.
        before: Work to do before each run, unmeasured.

    Returns:
        Costs by name, one per round.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for work in contenders.values():
        before()
        work()
    for round_ in range(pairs):
        for name in list(contenders)[:: -1 if round_ % 2 else 1]:
            before()
            costs[name].append(cost_of(contenders[name]))
    return costs


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    """Work that does the same several times, for what is too short to time alone."""

    def several() -> None:
        for _ in range(times):
            work()

    return several


def ratios(costs: Mapping[str, Sequence[Cost]], slow: str, fast: str, axis: Axis) -> list[float]:
    """Cost of ``slow`` divided by that of ``fast``, round by round."""
    pairs = zip(costs[slow], costs[fast], strict=True)
    return [float(getattr(theirs, axis) / getattr(ours, axis)) for theirs, ours in pairs]


def _children_cpu_s() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # and waited for
    total = ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            # Includes the children that it has waited for. Rounded to the kernel's ticks of 10 ms.
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return float(total)
