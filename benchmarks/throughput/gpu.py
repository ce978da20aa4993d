"""Suite ``gpu``: the training step on one GPU against the plain step and against what the GPU itself can do."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.throughput.cases import ALL_FIVE, CDIV, NAMES, Case, OurStep, PlainStep, check_parity, make_case
from benchmarks.throughput.fed import fed_and_resident, finish
from benchmarks.throughput.measure import (
    BenchmarkError,
    Measure,
    Result,
    Settings,
    cost_of,
    interleave,
    ratios,
    repeated,
)
from benchmarks.throughput.step import SMALL, kept_for_backward

IMAGENET, EPOCHS = 1_281_167, 50
_BATCH = 128  # the paper's global batch, on one GPU
# At batch 16 and without compilation, the host sets the pace of both steps of Tiny: each launches some thousand kernels
# of a few microseconds, so their ratio says how fast the host is, and has no aim. The plain step of Base is bound by
# float32 products: 2.9 TFLOP, some 55 ms at 50 TFLOP/s, for which ours has 10 ms of launches.
_AGAINST_PLAIN: dict[str, float | None] = {"tiny": None, "base": 5}
# What matters most comes first, because each takes a minute of compilation and the time may end.
_FULL = [("base", CDIV), ("tiny", CDIV), ("small", CDIV), ("tiny", ALL_FIVE), ("base", ALL_FIVE), ("small", ALL_FIVE)]
_LIMIT_S = 440.0  # for the whole suite: the command is to end within 8 minutes, of which it takes some to start
_CASE_S = 100.0  # expected of the first case that is compiled
# Bytes that an optimisation step moves for each parameter beside the activations: forward and backward read it, its
# gradient is written; AdamW reads parameter, gradient and two moments, and writes three of them back. All float32.
_BYTES_PER_PARAMETER = 4 * (3 + 4 + 3)
_DEVICE = "cuda"


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        Ratios to the plain step and to the limits of the device; hours that the published recipe takes. What no time
        was left for is named in a note and in the details.

    Raises:
        BenchmarkError: If there is no CUDA device, or the disk is too small.
        ParityError: If ours and the plain step disagree in float32.
    """
    began = time.monotonic()
    if not torch.cuda.is_available():
        raise BenchmarkError("The suite 'gpu' needs a CUDA device, and torch finds none. On a CPU, run: make bench")
    device = torch.device(_DEVICE)
    student: dict[str, Any] = SMALL if settings.small else {}
    side, copied = (64, 2**20) if settings.small else (8192, 2**30)
    matrix_rate, copy_rate = measure_matrix_rate(device, side), measure_copy_rate(device, copied)
    details: dict[str, Any] = {
        "matrix_flop_per_s": matrix_rate, "copy_bytes_per_s": copy_rate, "costs": {}, "parity": {}, "steps": {},
    }  # fmt: skip
    measures = [
        Measure(f"measured bfloat16 matrix product, {side} x {side} x {side}", [matrix_rate / 1e12], unit="TFLOP/s"),
        Measure("measured device copy, bytes read and written", [copy_rate / 1e12], unit="TB/s"),
    ]
    for size, aim in _AGAINST_PLAIN.items():
        case = make_case(CDIV, size, 2 if settings.small else 16, _DEVICE, **student)
        details["parity"][size] = check_parity(case, compiled=False)
        ours = OurStep(case, bfloat16=True, compiled=False)
        contenders = {"plain": _repeated(PlainStep(case)), "ours": _repeated(ours)}
        costs = interleave(contenders, settings.pairs)
        details["costs"][size] = {name: [asdict(cost) for cost in runs] for name, runs in costs.items()}
        name = f"training step, {size}, C+Di+V, batch 16, bfloat16, not compiled, against the plain step"
        measures.append(Measure(name, ratios(costs, "plain", "ours", "wall_s"), aim=aim))
        del case, contenders, ours
        torch.cuda.empty_cache()
    cases = {
        _name(size, teachers): partial(_at_full_batch, size, teachers, matrix_rate, copy_rate, settings, details)
        for size, teachers in _FULL
    }
    found, left_out = in_time(cases, began + _LIMIT_S)
    details["left_out"] = left_out
    notes = [
        f"Hours: {IMAGENET} images x {EPOCHS} epochs, global batch {_BATCH} on this one GPU, a resident batch.",
        "The plain step runs in float32, not compiled, batch resident.",
        *([f"Left out, for want of time: {'; '.join(left_out)}."] if left_out else []),
    ]
    return Result(measures + found, details, notes)


def in_time(
    cases: Mapping[str, Callable[[], list[Measure]]], end: float, clock: Callable[[], float] = time.monotonic
) -> tuple[list[Measure], list[str]]:
    """Measures cases in their order, and begins none that would end too late if it took as long as the longest so far.

    Args:
        cases: Functions that measure a case, by its name.
        end: Time of the clock at which all must have ended, in seconds.
        clock: Clock.

    Returns:
        Measures of the cases that were run; names of those that were not.
    """
    measures: list[Measure] = []
    left_out: list[str] = []
    longest = _CASE_S
    taken: list[float] = []
    for name, measure in cases.items():
        start = clock()
        if start + longest > end:
            left_out.append(name)
            continue
        measures += measure()
        torch.cuda.empty_cache()
        taken.append(clock() - start)
        longest = max(taken)
    return measures, left_out


def measure_matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Rate of a large bfloat16 matrix product in FLOP/s, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def measure_copy_rate(device: torch.device, size: int = 2**30) -> float:
    """Rate of a device copy in bytes/s, the best of several; bytes read and bytes written both count."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def step_flop(case: Case) -> int:
    """FLOP of matrix products and convolutions in one forward and backward pass of a batch."""
    # Attention as plain matrix products: torch's counter does not know all of its kernels in every release.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        OurStep(case, compiled=False).loss().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def step_bytes(case: Case, kept: int) -> int:
    """Bytes that a step must move: what is kept for backward twice, the batch twice, parameters and AdamW."""
    batch = [case.batch.images, *case.batch.patches.values()]
    parameters = sum(parameter.numel() for parameter in case.distiller.parameters())
    return 2 * kept + 2 * sum(tensor.nbytes for tensor in batch) + _BYTES_PER_PARAMETER * parameters


def hours(images_per_s: float) -> float:
    """Hours that the published recipe takes at a rate of images."""
    return IMAGENET * EPOCHS / images_per_s / 3600


def _name(size: str, teachers: dict[str, tuple[int, int]]) -> str:
    return f"{size}, {NAMES[len(teachers)]}, batch {_BATCH}"


def _at_full_batch(
    size: str,
    teachers: dict[str, tuple[int, int]],
    matrix_rate: float,
    copy_rate: float,
    settings: Settings,
    details: dict[str, Any],
) -> list[Measure]:
    name, student = _name(size, teachers), SMALL if settings.small else {}
    torch.compiler.reset()  # as in a process of its own: of one function, few compiled versions are kept
    case = make_case(teachers, size, _BATCH, _DEVICE, **student)
    step = OurStep(case, bfloat16=True)
    seconds = [_timed(step) for _ in range(settings.pairs + 1)][1:]  # the first compiles
    flop = _BATCH * step_flop(make_case(teachers, size, 1, "meta", **student))
    moved = step_bytes(case, kept_for_backward(step.loss, step.model.parameters(), case))
    details["steps"][name] = {"seconds": seconds, "flop": flop, "bytes": moved}
    bound = flop / matrix_rate + moved / copy_rate
    measures = [Measure(f"GPU-hours of the published recipe, {name}", [hours(_BATCH / s) for s in seconds], unit="h")]
    if teachers is CDIV and size == "base":
        shares = [flop / s / matrix_rate for s in seconds]
        measures.append(Measure(f"share of the measured matrix rate, {name}", shares, aim=0.35))
    if teachers is CDIV and size == "tiny":
        shares = [bound / s for s in seconds]
        measures.append(Measure(f"share of the bound (compute + memory, no overlap), {name}", shares, aim=0.4))
        shares = [share / copy_rate for share in _loss_bytes_per_s(step, settings)]
        measures.append(Measure(f"fused loss, share of the copy rate, {name}", shares, aim=0.7))
        fed = fed_and_resident(case, step, settings.folder, batches=16, workers=4, pairs=settings.pairs)
        details["costs"]["fed"] = {path: [asdict(cost) for cost in runs] for path, runs in fed.items()}
        label = f"images/s with the loader, {name}, four workers, against a resident batch"
        measures.append(Measure(label, ratios(fed, "resident", "loader", "wall_s"), aim=0.95))
    return measures


def _loss_bytes_per_s(step: OurStep, settings: Settings) -> list[float]:
    batch, device = step.batch, step.batch.images.device
    predictions = {
        name: torch.randn(raw.shape, dtype=torch.bfloat16, device=device).requires_grad_()
        for name, raw in batch.patches.items()
    }
    # Forward and backward read predictions and features, backward writes the gradient.
    moved = sum(3 * value.nbytes for value in predictions.values()) + sum(
        2 * raw.nbytes for raw in batch.patches.values()
    )

    def work() -> None:
        losses = step.objective.compare(predictions, {}, batch)
        torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(predictions.values()))

    return [moved / _seconds(work, device) for _ in range(settings.pairs)]


def _repeated(step: Callable[[], Tensor], times: int = 10) -> Callable[[], None]:
    steps = repeated(step, times)

    def work() -> None:
        steps()
        finish(torch.device(_DEVICE))

    return work


def _timed(step: Callable[[], Tensor], times: int = 10) -> float:
    return cost_of(_repeated(step, times)).wall_s / times


def _seconds(work: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Least duration of one call on the device itself, in seconds."""
    for _ in range(3):
        work()
    taken = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        taken.append(float(start.elapsed_time(end)) / 1e3)
    return min(taken)
