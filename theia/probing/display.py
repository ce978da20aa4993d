"""What was found of all encoders: as a table, as JSON, and as predicted maps beside what is true."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from theia.probing.datasets import MAX_DEPTH, TASKS, DenseData
from theia.probing.dense_metrics import IGNORED
from theia.probing.heads import head_task
from theia.probing.probes import Probed, shown
from theia.utils.files import replacing
from theia.utils.pictures import wrapped

_UNITS = {"rmse": "m", "aligned_rmse": "m", "angular_rmse": "degrees", "silog": "100 log m"}


def figures_table(found: Mapping[str, Probed]) -> str:
    """A row per figure, a column per encoder: the mean over seeds, and with several their standard deviation.

    Args:
        found: What was found of each encoder.
    """
    figures = dict.fromkeys(figure for probed in found.values() for figure in probed.figures)
    rows = []
    for figure in figures:
        cells = [_cell(probed.figures.get(figure, ())) for probed in found.values()]
        rows.append([figure, _unit(figure), _better(figure), *cells])
    table: str = tabulate(rows, headers=["figure", "unit", "better", *found], disable_numparse=True)
    return table


def as_json(found: Mapping[str, Probed]) -> dict[str, dict[str, Any]]:
    """The figures for the JSON file, by encoder and figure, with the value of every seed.

    Args:
        found: What was found of each encoder.
    """
    return {
        encoder: {
            figure: {
                "mean": fmean(values), "values": list(values), "unit": _unit(figure), "better": _better(figure),
            }
            for figure, values in probed.figures.items()
        }
        for encoder, probed in found.items()
    }  # fmt: skip


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _unit(figure: str) -> str:
    return _UNITS.get(figure.rpartition("/")[2], "")


def _better(figure: str) -> str:
    """Figures with a unit are errors, the others are shares."""
    return "less" if _unit(figure) else "more"


_INCHES = 1.5  # of a map
_UNKNOWN = 255  # white


def draw(path: Path, data: DenseData, probed: Mapping[str, Probed]) -> None:
    """Two val pictures with what is true, what is usual, and what the head on each encoder says.

    Args:
        path: PNG file to write.
        data: Data whose val pictures were probed.
        probed: Results by name of the column; each has maps of the same tasks.
    """
    mapped = next(iter(probed.values())).maps
    tasks = [task for task in TASKS if task in mapped]
    places = shown(len(data.val.images))
    rows = [(number, place, task) for number, place in enumerate(places) for task in tasks]
    figure = Figure((_INCHES * (2 + len(probed)), _INCHES * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), 2 + len(probed), squeeze=False)
    for row, (number, place, task) in zip(axes, rows, strict=True):
        truth = head_task(task, data).targets(data.val)[place]
        picture = data.val.images[place].transpose(1, 2, 0)
        maps = [truth, *(column.maps[task][number] for column in probed.values())]
        for axis, image in zip(row, [picture, *(_colours(task, values, truth) for values in maps)], strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(task, fontsize=8)
    for axis, name in zip(axes[0], ["picture", "truth", *probed], strict=True):
        axis.set_title(wrapped(name), fontsize=8)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]


def _colours(task: str, values: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.uint8]:
    """RGB of a map, ``(S, S, 3)``; white where nothing is known of the truth and this is it."""
    if task == "depth":
        valid = (truth > 0) & (truth <= MAX_DEPTH)
        low, high = (truth[valid].min(), truth[valid].max()) if valid.any() else (0.0, MAX_DEPTH)
        share = (values - low) / max(high - low, 1e-6)
        colours, unknown = colormaps["viridis"](share.clip(0, 1))[..., :3], values <= 0
    elif task == "normals":
        length = np.linalg.norm(values, axis=0)
        colours, unknown = (values / length.clip(1e-6) + 1).transpose(1, 2, 0) / 2, length == 0
    else:
        # Neighbours in the list differ in colour.
        colours, unknown = (
            colormaps["tab20"](values.astype(int) * 2 % 20 + values.astype(int) // 10 % 2)[..., :3],
            values == IGNORED,
        )
    return np.where(unknown[..., None], _UNKNOWN, 255 * colours).astype(np.uint8)
