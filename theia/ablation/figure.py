"""The picture of a sweep: ranked scores, what was learned from which teacher, and norm entropy against score."""

from typing import Any

from theia.ablation.summary import ENTROPY, RowSummary, Summary

_POINT, _REFERENCE, _FRAME = "#7ba3cc", "#e8963c", "#ff8c1a"
_SMALL, _TITLE = 7.5, 9.5  # points

# Where a label may be placed around its point, as offsets in points.
_PLACES = [
    (x * distance, y * distance)
    for distance in (5, 10, 16, 24, 34, 46)
    for x, y in ((1, 0), (-1, 0), (0.7, 0.9), (-0.7, 0.9), (0.7, -0.9), (-0.7, -0.9), (0, 1.2), (0, -1.2))
]


def draw(summary: Summary) -> Any:
    """Draws up to three panels, those for which there are data.

    Scores run to the right, unlike in the paper's figure 5, so that the names of thirty rows can be read; the matrix
    beside them has the same rows. They are points with intervals: bars would have to start at 0, where they look alike.

    Args:
        summary: What the report shows.

    Returns:
        A ``matplotlib.figure.Figure``; save it with ``savefig``.

    Source: Theia, figures 5 and 8.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    points = [row for row in summary.rows if {ENTROPY, summary.sort_by} <= {*row.columns}]
    widths = [5.2]
    if summary.readable:
        widths.append(0.7 + 0.6 * len(summary.readable))
    if len(points) > 1 and summary.sort_by != ENTROPY:
        widths.append(5.2)
    height = max(3.2, 1.2 + 0.28 * len(summary.rows))
    figure = Figure(figsize=(sum(widths), height), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.12))
    panels = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    _scores(panels[0], summary)
    if summary.readable:
        _transfer(panels[1], summary)
    if len(points) > 1 and summary.sort_by != ENTROPY:
        _scatter(panels[-1], summary, points)
        figure.draw_without_rendering()  # the labels are placed by where everything else is
        _label(figure, panels[-1], summary, points)
    return figure


def _scores(axes: Any, summary: Summary) -> None:
    column = summary.sort_by
    scored = [(place, row) for place, row in enumerate(summary.rows) if row.values]
    for place, row in scored:
        found = row.columns[column]
        colour = _REFERENCE if row.name == summary.reference else _POINT
        axes.errorbar(found.mean, place, xerr=found.half_width, fmt="o", markersize=6, color=colour,
                      markeredgecolor="black", markeredgewidth=0.6, ecolor="black", capsize=2.5,
                      linewidth=1)  # fmt: skip
        axes.scatter(list(row.values.values()), [place] * len(row.values), 9, "white", edgecolors="black", zorder=3,
                     linewidths=0.6)  # fmt: skip
        if row.name == summary.reference:
            axes.axvline(found.mean, color=_REFERENCE, linestyle="--", linewidth=1, zorder=2)
    for place, row in enumerate(summary.rows):
        if not row.values:
            axes.text(0.02, place, "no such score", fontsize=_SMALL, style="italic", va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(range(len(summary.rows)), [row.name for row in summary.rows], fontsize=_SMALL)
    axes.set_ylim(len(summary.rows) - 0.5, -0.5)
    axes.set_xlim(_ends(summary))
    direction = "higher is better" if summary.higher_is_better(column) else "lower is better"
    axes.set_xlabel(f"{column}\n({direction})", fontsize=_SMALL)
    axes.set_title("Score", fontsize=_TITLE)
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _ends(summary: Summary) -> tuple[float, float]:
    """Ends of the axis of scores."""
    found = [row.columns[summary.sort_by] for row in summary.rows if row.values]
    lows = [one.mean if one.low is None else one.low for one in found]
    highs = [one.mean if one.high is None else one.high for one in found]
    values = [value for row in summary.rows for value in row.values.values()]
    low, high = min(*lows, *values), max(*highs, *values)
    margin = 0.08 * ((high - low) or abs(high) or 1)
    return low - margin, high + margin


def _transfer(axes: Any, summary: Summary) -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    cells = np.array([summary.transfer(row) for row in summary.rows], float)  # None becomes NaN, a blank cell
    # From nothing to everything explained: shades that span the differences alone would make much of chance.
    shades = np.clip(cells, 0, 1)
    axes.imshow(shades, cmap="Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    for (place, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            dark = shades[place, column] > 0.6
            axes.text(column, place, f"{value:.2f}", fontsize=_SMALL, ha="center", va="center",
                      color="white" if dark else "black")  # fmt: skip
        if summary.readable[column] in summary.rows[place].teachers:
            corner = (column - 0.45, place - 0.42)
            axes.add_patch(Rectangle(corner, 0.9, 0.84, fill=False, edgecolor=_FRAME, linewidth=1.6))
    axes.set_xticks(range(len(summary.readable)), summary.readable, fontsize=_SMALL, rotation=30, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    axes.set_yticks([])
    axes.set_title("Read out of the student", fontsize=_TITLE)
    axes.set_xlabel("explained variance, shaded from 0 to 1; framed: distilled from", fontsize=_SMALL)


def _scatter(axes: Any, summary: Summary, points: list[RowSummary]) -> None:
    for row in points:
        x, y = row.columns[ENTROPY], row.columns[summary.sort_by]
        colour = _REFERENCE if row.name == summary.reference else _POINT
        axes.errorbar(x.mean, y.mean, y.half_width, x.half_width, fmt="none", color="#c4c4c4", linewidth=0.8, zorder=1)
        axes.scatter(x.mean, y.mean, 26, colour, edgecolors="black", linewidths=0.6, zorder=3)
    axes.margins(0.12)
    axes.set_xlabel("norm entropy of patch tokens (nats)", fontsize=_SMALL)
    axes.set_ylabel(summary.sort_by, fontsize=_SMALL)
    axes.set_title("Norm entropy and score" + _r(summary), fontsize=_TITLE)
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _r(summary: Summary) -> str:
    found = summary.entropy
    if found is None:
        return ""
    interval = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f": r = {found.r:.2f}{interval}"


def _label(figure: Any, axes: Any, summary: Summary, points: list[RowSummary]) -> None:
    """Labels each point where the label hides least, and near the point."""
    from matplotlib.transforms import Bbox

    pixels = figure.dpi / 72  # per point of the offsets
    frame = axes.get_window_extent()
    data = [(row.columns[ENTROPY].mean, row.columns[summary.sort_by].mean) for row in points]
    places = axes.transData.transform(data)
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    arrow = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3}
    for row, point, (x, y) in zip(points, data, places, strict=True):
        text = axes.annotate(row.name, point, (0, 0), textcoords="offset points", fontsize=6.5, va="center",
                             arrowprops=arrow, zorder=2)  # fmt: skip
        size = text.get_window_extent()
        boxes = {}
        for right, up in _PLACES:
            left = x + right * pixels - size.width * (0.5 - 0.5 * (right > 0) + 0.5 * (right < 0))
            boxes[right, up] = Bbox.from_bounds(
                left, y + up * pixels - 0.6 * size.height, size.width, 1.2 * size.height
            )
        best = min(boxes, key=lambda place: _hidden(boxes[place], taken, frame))
        text.set_position(best)
        text.set_ha("left" if best[0] > 0 else "right" if best[0] < 0 else "center")
        taken.append(boxes[best])


def _hidden(box: Any, taken: list[Any], frame: Any) -> float:
    """Area of a label in square pixels that hides something or, ten times as bad, lies outside the panel."""
    shared = (type(box).intersection(box, other) for other in [*taken, frame])
    *on_others, inside = (part.width * part.height if part else 0.0 for part in shared)
    return float(sum(on_others) + 10 * (box.width * box.height - inside))
