"""Suite ``step``: the training step on a CPU against the plain step, its loss, and what both keep for backward."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.throughput.cases import ALL_FIVE, CDIV, NAMES, Case, OurStep, PlainStep, check_parity, make_case
from benchmarks.throughput.fed import fed_and_resident
from benchmarks.throughput.measure import Cost, Measure, Result, Settings, interleave, ratios, repeated
from theia.training.losses import FeatureLoss, Objective

_BATCH = 8
SMALL = {"width": 32, "depth": 1, "heads": 1}  # options of a student, for a test of the benchmark itself

_BFLOAT16 = "bfloat16, compiled loss"
_AIMS = {len(CDIV): 2.2, len(ALL_FIVE): 2.8}  # in bfloat16, by the number of teachers
_KEPT = 0.42


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        Steps per CPU-second in units of the plain step's, and bytes kept for backward in those of the plain step's, for
        three teachers and for five; the speed of the loss alone; images per second from the loader in units of those
        from memory.

    Raises:
        ParityError: If ours and the plain step disagree in float32.
    """
    measures: list[Measure] = []
    details: dict[str, Any] = {"batch_size": 2 if settings.small else _BATCH, "parity": {}, "costs": {}, "bytes": {}}
    for teachers in (CDIV, ALL_FIVE):
        name = NAMES[len(teachers)]
        student: dict[str, Any] = SMALL if settings.small else {}
        case = make_case(teachers, "tiny", details["batch_size"], **student)
        details["parity"][name] = check_parity(case)
        plain = PlainStep(case)
        ours = {
            "float32, not compiled": OurStep(case, compiled=False),
            "float32, compiled loss": OurStep(case),
            _BFLOAT16: OurStep(case, bfloat16=True),
        }
        costs = interleave({"plain": plain, **ours}, settings.pairs)
        details["costs"][name] = _raw(costs)
        for label in ours:
            measures.append(
                Measure(
                    f"training step, Tiny, {name}, {label}, against the plain step",
                    ratios(costs, "plain", label, "cpu_s"),
                    aim=_AIMS[len(teachers)] if label == _BFLOAT16 else None,
                )
            )
        kept = {"plain": kept_for_backward(plain.loss, plain.model.parameters(), case)}
        for label, step in ours.items():
            kept[label] = kept_for_backward(step.loss, step.model.parameters(), case)
            measures.append(
                Measure(
                    f"kept for backward, {name}, {label}, against the plain step",
                    [kept[label] / kept["plain"]],
                    aim=_KEPT if label == _BFLOAT16 else None,
                    at_most=True,
                )
            )
        details["bytes"][name] = kept
        if teachers is CDIV:
            loss_costs = _loss_alone(case, plain, settings)
            details["costs"]["loss alone"] = _raw(loss_costs)
            measures.append(
                Measure(
                    "loss alone, forward and backward, compiled, against the plain loss",
                    ratios(loss_costs, "plain", "compiled", "wall_s"),
                    aim=15,
                )
            )
            batches = 2 if settings.small else 3
            fast = ours[_BFLOAT16]
            fed = fed_and_resident(case, fast, settings.folder, batches, workers=1, pairs=settings.pairs)
            details["costs"]["fed"] = _raw(fed)
            measures.append(
                Measure(
                    f"images/s with the loader, Tiny, {name}, bfloat16, one worker, against a resident batch",
                    ratios(fed, "resident", "loader", "wall_s"),
                    aim=0.95,
                )
            )
    return Result(measures, details, notes=["The plain step runs in float32. Its transformer is timm's own."])


def kept_for_backward(loss: Callable[[], Tensor], parameters: Any, case: Case) -> int:
    """Bytes of all tensors that a forward pass keeps, besides parameters, statistics and the batch."""
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*parameters, *case.fixed)}
    kept: dict[int, int] = {}
    alive = []  # freed memory would be handed out again under the same address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(kept.values())


def _loss_alone(case: Case, plain: PlainStep, settings: Settings) -> dict[str, list[Cost]]:
    with torch.no_grad():
        _, predictions, _ = case.distiller(case.batch.images)
    predictions = {name: value.contiguous().requires_grad_() for name, value in predictions.items()}
    objective = Objective(case.distiller, FeatureLoss())
    objective.compile(torch.device("cpu"))

    def compiled() -> None:
        losses = objective.compare(predictions, {}, case.batch)
        torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(predictions.values()))

    def published() -> None:
        loss, _ = plain.model.loss_of(predictions, case.batch.patches)
        torch.autograd.grad(loss, list(predictions.values()))

    times = 1 if settings.small else 10

    return interleave({"plain": repeated(published, times), "compiled": repeated(compiled, times)}, settings.pairs)


def _raw(costs: dict[str, list[Cost]]) -> dict[str, list[dict[str, float]]]:
    return {name: [asdict(cost) for cost in runs] for name, runs in costs.items()}
