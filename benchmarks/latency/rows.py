"""Runs all runtimes in turn on the same photographs and compares what they give with what PyTorch gives."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.latency.runtimes import (
    BASELINE,
    DEFAULT,
    Case,
    Photographs,
    Precision,
    Runtime,
    Started,
    UnavailableError,
)
from benchmarks.throughput.measure import BenchmarkError, Cost, Measure, ParityError, interleave, ratios, repeated

LEAST_SPEEDUP = 1.9
MOST_DISTANCE = 1e-5
# Largest 1 - cosine, whatever the weights; more than that is an error of the runtime, or of ours.
_SANE: dict[Precision, float] = {"float32": 1e-6, "bfloat16": 1e-3, "int8": 1e-2}
_TURN_S = 0.5
# Reading the clocks and the operating system's own work add a little to the threads' time.
_MORE_THREADS = 0.25


@dataclass(frozen=True)
class Row:
    """One runtime on one batch size of one model.

    Attributes:
        model: Name of the model.
        weights: ``"trained"``, ``"random"`` or ``"given"``.
        device: ``"cpu"`` or ``"cuda"``.
        batch_size: Number of images in one call.
        runtime: Name of the runtime.
        missing: Reason why it was not measured; everything below is then empty.
        precision: Precision of its matrix products.
        threads: Number of threads that it reports.
        calls: Number of counted calls in each turn.
        costs: Cost of one call, by turn.
        speedup: Eager time divided by its time on the clock, turn by turn.
        cpu_speedup: Eager processor time divided by its processor time, turn by turn.
        distance: Largest 1 - cosine over images, between its patch tokens and the eager ones.
    """

    model: str
    weights: str
    device: str
    batch_size: int
    runtime: str
    missing: str | None = None
    precision: Precision | None = None
    threads: int | None = None
    calls: int = 0
    costs: list[Cost] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)
    cpu_speedup: list[float] = field(default_factory=list)
    distance: float = 0.0

    @property
    def measures(self) -> list[Measure]:
        """Figures of the row, with aims for the runtime to deploy; random weights have no aim for the cosine."""
        if self.missing is not None:
            return []
        aimed = self.runtime == DEFAULT and self.device == "cpu" and self.batch_size == 1
        name = f"{self.model}, {self.device}, batch {self.batch_size}, {self.runtime}"
        distance_aim = MOST_DISTANCE if aimed and self.weights != "random" else None
        return [
            Measure(f"{name}: speed against eager", self.speedup, aim=LEAST_SPEEDUP if aimed else None),
            Measure(f"{name}: the same, CPU time", self.cpu_speedup),
            Measure(f"{name}: 1 - cosine", [self.distance], unit="", aim=distance_aim, at_most=True),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


def measure(
    case: Case,
    runtimes: Mapping[str, Runtime],
    photographs: Photographs,
    pairs: int,
    *,
    model: str,
    weights: str,
    device: str = "cpu",
    turn_s: float = _TURN_S,
) -> list[Row]:
    """Measures one batch size of one model.

    Args:
        case: Encoder and batch size to run.
        runtimes: Runtimes by name, the baseline among them.
        photographs: Images to compare on, uint8 ``(images, H, W, 3)``; repeated to fill a batch.
        pairs: Number of turns of each runtime.
        model: See :class:`Row`.
        weights: See :class:`Row`.
        device: See :class:`Row`.
        turn_s: Least duration of a turn of the baseline, in seconds.

    Returns:
        One row per runtime, in the same order.

    Raises:
        ParityError: If a runtime gives other tokens than PyTorch.
        BenchmarkError: If a runtime uses more threads than it was given.
    """
    # A limit on recompilations counts over all encoders, which share their code.
    torch.compiler.reset()
    started: dict[str, Started] = {}
    missing: dict[str, str] = {}
    for name, runtime in runtimes.items():
        try:
            started[name] = runtime(case)
        except UnavailableError as error:
            missing[name] = str(error)
    batches = _batches(photographs, case.batch_size)
    tokens = {name: _tokens(way, batches) for name, way in started.items()}
    distances = {name: distance(tokens[BASELINE], found) for name, found in tokens.items()}
    for name, way in started.items():
        _check_sane(name, way.precision, distances[name])
    placed = {name: way.place(batches[0]) for name, way in started.items()}
    begin = time.perf_counter()
    started[BASELINE].run(placed[BASELINE])
    calls = max(1, round(turn_s / (time.perf_counter() - begin)))
    work = {name: repeated(partial(way.run, placed[name]), calls) for name, way in started.items()}
    turns = interleave(work, pairs)
    costs = {name: [cost / calls for cost in values] for name, values in turns.items()}
    if device == "cpu":
        for name in started:
            check_threads(name, turns[name], started[name].threads, case.threads)
    shared: dict[str, Any] = {"model": model, "weights": weights, "device": device, "batch_size": case.batch_size}
    return [
        Row(**shared, runtime=name, missing=missing[name])
        if name in missing
        else Row(
            **shared,
            runtime=name,
            precision=started[name].precision,
            threads=started[name].threads,
            calls=calls,
            costs=costs[name],
            speedup=ratios(costs, BASELINE, name, "wall_s"),
            cpu_speedup=ratios(costs, BASELINE, name, "cpu_s"),
            distance=distances[name],
        )
        for name in runtimes
    ]


def distance(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Largest 1 - cosine over images, with all tokens of an image in one vector.

    It is computed from the difference of the unit vectors: 1 - cosine itself would be lost to rounding where they are
    nearly equal.

    Args:
        expected: Tokens of the baseline, shape ``(images, N, C)``.
        found: Tokens to compare with them, same shape.

    Raises:
        ParityError: If the shapes differ.
    """
    if expected.shape != found.shape:
        raise ParityError(f"Tokens of shape {found.shape} instead of {expected.shape}.")
    units = [values.reshape(len(values), -1).astype(np.float64) for values in (expected, found)]
    mine, theirs = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in units)
    return float((np.square(mine - theirs).sum(1) / 2).max())


def check_threads(name: str, turns: list[Cost], said: int, threads: int) -> None:
    """Makes sure that a runtime kept to its threads.

    Args:
        name: Name of the runtime.
        turns: Costs of its turns.
        said: Number of threads that it reports.
        threads: Number of threads that it was given.

    Raises:
        BenchmarkError: If it reports or uses others.
    """
    busy = sum(turn.cpu_s for turn in turns) / sum(turn.wall_s for turn in turns)
    if said != threads or busy > threads + _MORE_THREADS:
        raise BenchmarkError(
            f"{name!r} was to take {threads} threads. It reports {said}, and kept {busy:.2f} cores busy. "
            "Unset the variables that set threads, such as OMP_NUM_THREADS."
        )


def _batches(photographs: Photographs, size: int) -> list[Photographs]:
    """Batches of one size that hold every photograph."""
    count = -(-len(photographs) // size) * size
    rows = np.arange(count) % len(photographs)
    return [np.ascontiguousarray(photographs[rows[start : start + size]]) for start in range(0, count, size)]


def _tokens(way: Started, batches: list[Photographs]) -> NDArray[np.float32]:
    found = [way.run(way.place(batch)) for batch in batches]
    return np.concatenate([value.cpu().numpy() if isinstance(value, Tensor) else value for value in found])


def _check_sane(name: str, precision: Precision, found: float) -> None:
    # Written so that NaN is refused, too.
    if not found <= _SANE[precision]:
        raise ParityError(
            f"{name!r} ({precision}) gives other patch tokens than PyTorch: 1 - cosine is {found:.1e}, and "
            f"{_SANE[precision]:.0e} is the most."
        )
