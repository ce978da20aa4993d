"""One table for people, and the records for the JSON."""

from collections.abc import Sequence
from statistics import median

from tabulate import tabulate

from benchmarks.latency.rows import LEAST_SPEEDUP, MOST_DISTANCE, Row
from benchmarks.latency.runtimes import DEFAULT
from benchmarks.throughput.measure import Result

_HEADERS = [
    "model", "device", "batch", "runtime", "precision", "ms", "CPU ms", "x eager", "least", "greatest", "x CPU time",
    "cosine", "1 - cosine", "target", "reached",
]  # fmt: skip
_TEXT = ("model", "device", "runtime", "precision", "target", "reached")


def table(rows: Sequence[Row]) -> str:
    """All rows, and under them what is not measured and what a reader must know.

    Args:
        rows: Rows in the order of the table.
    """
    align = ["left" if header in _TEXT else "right" for header in _HEADERS]
    cells = [_cells(row) for row in rows]
    lines = [tabulate(cells, headers=_HEADERS, disable_numparse=True, colalign=align)]
    missing = dict.fromkeys(f"{row.runtime}: {row.missing}" for row in rows if row.missing is not None)
    return "\n".join([*lines, *missing, *notes(rows)])


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know.

    Args:
        rows: All measured rows.
    """
    found = [
        "From uint8 photographs in memory to patch tokens. Medians over turns; eager time over its own, turn by turn.",
        "Cosine to eager float32 over all tokens of an image, the least over images.",
        f"The path to deploy on a CPU is {DEFAULT!r}. Its target is at batch 1.",
    ]
    threads = sorted({row.threads for row in rows if row.threads is not None})
    found.append(f"Threads of every runtime: {', '.join(map(str, threads))}.")
    random = dict.fromkeys(row.model for row in rows if row.weights == "random")
    if random:
        found.append(f"Random weights: {', '.join(random)}. Their cosines say little about a trained model's.")
    return found


def results(rows: Sequence[Row]) -> dict[str, Result]:
    """Results for the JSON, by model, device and batch.

    Args:
        rows: All measured rows.
    """
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(f"{row.model}, {row.device}, batch {row.batch_size}", []).append(row)
    return {
        name: Result(
            [measure for row in group for measure in row.measures],
            details={"rows": [row.as_dict() for row in group]},
            notes=notes(group),
        )
        for name, group in grouped.items()
    }


def _cells(row: Row) -> list[str]:
    model = f"{row.model} ({row.weights})"
    head = [model, row.device, str(row.batch_size), row.runtime]
    if row.missing is not None:
        return [*head, "not measured", *[""] * (len(_HEADERS) - len(head) - 1)]
    milliseconds = [1e3 * median(getattr(cost, axis) for cost in row.costs) for axis in ("wall_s", "cpu_s")]
    return [
        *head,
        str(row.precision),
        *(f"{value:.1f}" for value in milliseconds),
        f"{median(row.speedup):.2f}",
        f"{min(row.speedup):.2f}",
        f"{max(row.speedup):.2f}",
        f"{median(row.cpu_speedup):.2f}",
        f"{1 - row.distance:.7f}",
        f"{row.distance:.1e}",
        *_target(row),
    ]


def _target(row: Row) -> tuple[str, str]:
    aimed = [measure for measure in row.measures if measure.aim is not None]
    texts = {LEAST_SPEEDUP: f">= {LEAST_SPEEDUP}x", MOST_DISTANCE: f"1 - cosine <= {MOST_DISTANCE:.0e}"}
    reached = ["yes" if measure.reached else "no" for measure in aimed]
    return ", ".join(texts[measure.aim] for measure in aimed if measure.aim is not None), ", ".join(reached)
