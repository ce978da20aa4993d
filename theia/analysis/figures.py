"""Figures of an analysis as plots: norms, principal components, similarity, CKA, and figure against score."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from theia.analysis.measure import EncoderFigures
from theia.analysis.norms import Counts
from theia.analysis.scores import DISTILLED, PearsonR
from theia.analysis.similarity import COSINE_BINS
from theia.training.metrics import NORM_BINS, NORM_RANGE
from theia.utils.pictures import wrapped

_SMALL, _TITLE = 7.5, 9.5  # points
_BAR = "#7ba3cc"
_DISTILLED, _OTHERS = "#e8963c", ("#4f7fb0", "#5a9e6f", "#9b6fb0", "#8c8c8c")


def draw_norms(figures: Mapping[str, EncoderFigures], labels: Mapping[str, str]) -> Any:
    """Histograms of token norms, a row per encoder: in the unit that all share, and in that of its own median.

    Args:
        figures: Figures of each encoder, by name.
        labels: What to call each encoder, by name.

    Returns:
        A ``matplotlib.figure.Figure``, as all functions here; save it with ``savefig``.

    Source: Theia, figure 14.
    """
    figure = _figure(8.2, 0.5 + 1.35 * len(figures))
    axes = figure.subplots(len(figures), 2, squeeze=False, sharex=True)
    for row, (name, found) in zip(axes, figures.items(), strict=True):
        beyond = f", {found.entropy.beyond:.0%} beyond" if found.entropy.beyond >= 0.005 else ""
        _histogram(row[0], found.entropy.counts, f"{labels[name]}: H = {found.entropy.value:.2f}{beyond}")
        if found.relative.counts is None or found.relative.entropy is None:
            row[1].text(0.5, 0.5, "median norm is 0", ha="center", transform=row[1].transAxes, fontsize=_SMALL)
            row[1].set_yticks([])
            _plain(row[1])
        else:
            _histogram(row[1], found.relative.counts, f"relative: H = {found.relative.entropy:.2f}")
    axes[0, 0].set_xlim(-0.02 * NORM_RANGE, NORM_RANGE)  # a bar at 0 is not hidden by the axis
    figure.supylabel("share of tokens", fontsize=_SMALL)
    axes[-1, 0].set_xlabel("norm / √width (the last bin holds all beyond)", fontsize=_SMALL)
    axes[-1, 1].set_xlabel("norm / median norm of the encoder", fontsize=_SMALL)
    return figure


def draw_spectra(figures: Mapping[str, EncoderFigures], labels: Mapping[str, str]) -> Any:
    """Cumulative explained-variance ratio over the share of components. Source: Theia, figures 15 and 16."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for colour, (name, found) in zip(_colours(len(figures)), figures.items(), strict=True):
        curve = found.spectrum.cumulative
        if curve is None:
            axes.plot([], [], color=colour, label=f"{labels[name]}: all tokens are the same")
        else:
            shares = np.linspace(0, 1, len(curve))
            label = f"{labels[name]}: area {found.spectrum.area:.3f}, {found.width} components"
            axes.plot(shares, curve, color=colour, linewidth=1.4, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("share of principal components, largest first", fontsize=_SMALL)
    axes.set_ylabel("share of variance explained", fontsize=_SMALL)
    _finish(axes)
    return figure


def draw_similarity(figures: Mapping[str, EncoderFigures], labels: Mapping[str, str]) -> Any:
    """Distribution of the cosine of tokens to their image's mean token. Source: Theia, figure 16."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    edges = np.linspace(-1, 1, COSINE_BINS + 1)
    lowest = 1.0
    for colour, (name, found) in zip(_colours(len(figures)), figures.items(), strict=True):
        counts, mean = found.similarity.counts, found.similarity.mean
        if mean is None:
            axes.plot([], [], color=colour, label=f"{labels[name]}: no token has a cosine")
            continue
        lowest = min(lowest, float(edges[np.flatnonzero(counts)[0]]))
        below = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
        axes.plot(edges, below, color=colour, linewidth=1.4, label=f"{labels[name]}: mean {mean:.3f}")
    axes.set_xlim(max(-1, lowest - 0.02) if lowest < 1 else -1, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("cosine of a token to the mean token of its image", fontsize=_SMALL)
    axes.set_ylabel("share of tokens below", fontsize=_SMALL)
    _finish(axes)
    return figure


def draw_cka(matrix: Sequence[Sequence[float | None]], labels: Sequence[str]) -> Any:
    """CKA of all pairs as a heat map; a cell without a value is undefined."""
    side = 1.8 + 0.62 * len(labels)
    figure = _figure(side + 0.8, side, "compressed")
    axes = figure.subplots()
    cells = np.array(matrix, float)  # None becomes NaN, a blank cell
    image = axes.imshow(cells, cmap="viridis", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(cells):
        known = np.isfinite(value)
        axes.text(column, row, f"{value:.2f}" if known else "–", ha="center", va="center", fontsize=_SMALL,
                  color="black" if not known or value > 0.6 else "white")  # fmt: skip
    names = [wrapped(label) for label in labels]
    axes.set_xticks(range(len(labels)), names, fontsize=_SMALL, rotation=90)
    axes.set_yticks(range(len(labels)), names, fontsize=_SMALL)
    bar = figure.colorbar(image, shrink=0.8)
    bar.set_label("linear CKA", fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL)
    return figure


def draw_scores(
    figure_name: str,
    values: Mapping[str, float | None],
    scores: Mapping[str, float],
    groups: Mapping[str, str],
    labels: Mapping[str, str],
    found: Sequence[PearsonR],
) -> Any:
    """A figure of encoders against their scores, a colour and a line per group. Source: Theia, figures 7 and 11.

    Args:
        figure_name: What is on the horizontal axis.
        values: Value of the figure for each encoder; those without a value or a score are left out.
        scores: Score of each encoder.
        groups: Group of each encoder.
        labels: What to call each encoder.
        found: Correlations; those of this figure are put into the legend.
    """
    figure = _figure(6.4, 4.6)
    axes = figure.subplots()
    others = iter(_OTHERS * len(groups))
    known = [value for name, value in values.items() if value is not None and name in scores]
    middle = (min(known) + max(known)) / 2
    by_group = {one.group: one for one in found if one.figure == figure_name}
    for group in sorted({groups[name] for name in scores}):
        points = {
            name: (value, scores[name])
            for name, value in values.items()
            if value is not None and name in scores and groups[name] == group
        }
        if not points:
            continue
        colour = _DISTILLED if group == DISTILLED else next(others)
        x, y = (np.array(side) for side in zip(*points.values(), strict=True))
        axes.scatter(x, y, 30, colour, edgecolors="black", linewidths=0.6, zorder=3, label=_legend(group, by_group))
        if by_group[group].r is not None:
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=colour, linewidth=1, linestyle="--")
        for name, point in points.items():
            right = point[0] > middle  # a label points inwards
            axes.annotate(labels[name], point, (-5 if right else 5, 4), textcoords="offset points", fontsize=6.5,
                          ha="right" if right else "left")  # fmt: skip
    axes.margins(0.12)
    axes.set_xlabel(figure_name, fontsize=_SMALL)
    axes.set_ylabel("score", fontsize=_SMALL)
    _finish(axes, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _legend(group: str, by_group: Mapping[str, PearsonR]) -> str:
    one = by_group[group]
    if one.r is None:
        return f"{group} ({one.n})"
    interval = "" if one.low is None or one.high is None else f" [{one.low:.2f}, {one.high:.2f}]"
    return f"{group} ({one.n}): r = {one.r:.2f}{interval}"


def _histogram(axes: Any, counts: Counts, title: str) -> None:
    axes.stairs(counts / counts.sum(), np.linspace(0, NORM_RANGE, NORM_BINS + 1), fill=True, color=_BAR)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=_TITLE - 1, loc="left")
    _plain(axes)


def _finish(axes: Any, **place: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=_SMALL, frameon=False, **place)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    few = 10
    if count <= few:
        return [colormaps["tab10"](place) for place in range(count)]
    return [colormaps["turbo"](place / (count - 1)) for place in range(count)]


def _figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout=layout)
