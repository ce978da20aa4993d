"""The samples of a watched training as a table, a JSON and a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.soak.watch import Sample, slope_per_hour
from theia.utils.files import replacing, write_whole

# The first part of a run fills caches and takes its first validations.
WARM_UP = 1 / 3
# Growth of the memory of all processes after it that a run of half an hour can tell from the swings of an allocator.
MOST_GROWTH = 0.05
_SHOWN = {
    "pss_mb": "memory of all processes, shared pages once (MB)",
    "uss_mb": "memory that is not shared (MB)",
    "rss_mb": "resident memory of the training process (MB)",
    "descriptors": "open file descriptors",
    "threads": "threads",
    "processes": "processes",
    "shared_memory": "files in /dev/shm",
}


def summarize(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Summarises each figure: means over a tenth of the run after the warm-up and at the end, maximum and slope.

    Args:
        samples: Samples in order of time, at least four.
    """
    warm = after_warm_up(samples)
    tenth = max(1, len(warm) * 3 // 20)
    seconds = [sample.seconds for sample in warm]
    summary = {}
    for name in _SHOWN:
        values = [float(getattr(sample, name)) for sample in warm]
        summary[name] = {
            "after_warm_up": sum(values[:tenth]) / tenth,
            "end": sum(values[-tenth:]) / tenth,
            "greatest": max(values),
            "slope_per_hour": slope_per_hour(seconds, values),
        }
    return summary


def after_warm_up(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of the run without its first third."""
    return list(samples[int(len(samples) * WARM_UP) :])


def grown(summary: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line for each figure that kept growing; none if all is well.

    Args:
        summary: Summary of the run.
    """
    lines = []
    memory = summary["pss_mb"]
    if memory["end"] > memory["after_warm_up"] * (1 + MOST_GROWTH):
        lines.append(f"memory grew from {memory['after_warm_up']:.0f} to {memory['end']:.0f} MB")
    for name in ("descriptors", "threads", "processes", "shared_memory"):
        if summary[name]["end"] > summary[name]["after_warm_up"] + 1:
            lines.append(f"{_SHOWN[name]} grew from {summary[name]['after_warm_up']:.0f} to {summary[name]['end']:.0f}")
    return lines


def table(summary: Mapping[str, Mapping[str, float]]) -> str:
    """The summary as a table for a terminal."""
    rows = [
        [heading, *(summary[name][column] for column in ("after_warm_up", "end", "greatest", "slope_per_hour"))]
        for name, heading in _SHOWN.items()
    ]
    headings = ["", "after warm-up", "end", "greatest", "slope per hour"]
    return str(tabulate(rows, headers=headings, floatfmt=".1f"))


def write(
    path: Path, samples: Sequence[Sample], summary: Mapping[str, Mapping[str, float]], more: Mapping[str, Any]
) -> None:
    """Writes a JSON, and a picture beside it.

    Args:
        path: Path of the JSON file; the picture has the suffix ``.png``.
        samples: Samples in order of time.
        summary: Summary of these samples.
        more: Further entries of the JSON, as plain values.

    Raises:
        FileError: If a file cannot be written, for instance on a full disk.
    """
    record = {**more, "summary": summary, "samples": [asdict(sample) for sample in samples]}
    write_whole(path, json.dumps(record, indent=1) + "\n")
    with replacing(path.with_suffix(".png")) as picture:
        _picture(samples).savefig(picture, dpi=120, format="png")


def _picture(samples: Sequence[Sample]) -> Figure:
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, counts = figure.subplots(2, 1, sharex=True)
    minutes = [sample.seconds / 60 for sample in samples]
    for axes, names in ((memory, ("pss_mb", "uss_mb", "rss_mb")), (counts, ("descriptors", "threads", "processes"))):
        for name in names:
            axes.plot(minutes, [getattr(sample, name) for sample in samples], label=_SHOWN[name])
        axes.axvspan(minutes[0], after_warm_up(samples)[0].seconds / 60, color="0.9", label="warm-up")
        axes.set_ylim(bottom=0)
        axes.legend()
    counts.set_xlabel("minutes")
    return figure
