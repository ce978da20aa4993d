"""The folder of an analysis: a page to read, its pictures, and everything as JSON."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from theia.analysis import figures, maps
from theia.analysis.norms import BIN_COUNTS, OUTLIER_FACTOR
from theia.analysis.results import NORM_ENTROPY, Analysis, as_json, scalars
from theia.analysis.scores import DISTILLED
from theia.errors import ConfigError
from theia.training.metrics import NORM_BINS, NORM_RANGE
from theia.utils.files import check_folder, write_whole, writing

JSON, REPORT = "analysis.json", "report.md"
_PICTURES = ("norms.png", "norm_maps.png", "pca.png", "similarity.png", "cka.png", "scores.png")


def check_free(folder: Path, overwrite: bool) -> None:
    """Makes sure that an analysis can be written there, before hours are spent on it; leaves no trace.

    Args:
        folder: Folder of the analysis.
        overwrite: Whether an earlier analysis may be replaced.

    Raises:
        ConfigError: If the folder holds something else, or an analysis that is not to be replaced, or cannot be
            written.
    """
    check_folder(folder, "--out")
    if folder.is_dir() and any(folder.iterdir()):
        if not _is_analysis(folder / JSON):
            raise ConfigError(f"{folder} holds something that is no analysis. Choose another folder with --out.")
        # The page is written last: without it, an analysis was interrupted.
        if (folder / REPORT).exists() and not overwrite:
            raise ConfigError(
                f"{folder} holds an analysis already. Replace it with --overwrite, or choose another folder with --out."
            )


def write_report(folder: Path, analysis: Analysis) -> list[Path]:
    """Writes ``report.md``, its pictures and ``analysis.json``, each whole or not at all.

    The files of an earlier analysis are replaced; others in the folder are left alone.

    Args:
        folder: Folder to write into; see :func:`check_free`.
        analysis: Analysis to write.

    Returns:
        The files, the page last.

    Raises:
        FileError: If it cannot be written, for instance on a full disk.
    """
    pictures = _draw(analysis)
    contents = {
        # First: it says that the folder is an analysis, which may be written again after a kill.
        JSON: (json.dumps(as_json(analysis), indent=1, allow_nan=False) + "\n").encode(),
        **pictures,
        REPORT: page(analysis, [*pictures]).encode(),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    with writing(folder):
        for name in {*_PICTURES}.difference(pictures):
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in contents]


def _draw(analysis: Analysis) -> dict[str, bytes]:
    measured, labels = analysis.measured, analysis.labels
    drawn: dict[str, Any] = {"norms.png": figures.draw_norms(measured.encoders, labels)}
    if measured.maps.images:
        drawn["norm_maps.png"] = maps.board(measured.maps, labels)
    drawn["pca.png"] = figures.draw_spectra(measured.encoders, labels)
    drawn["similarity.png"] = figures.draw_similarity(measured.encoders, labels)
    if len(measured.encoders) > 1:
        drawn["cka.png"] = figures.draw_cka(measured.cka, [labels[name] for name in measured.encoders])
    if analysis.correlations:
        values = scalars(measured.encoders)[NORM_ENTROPY]
        drawn["scores.png"] = figures.draw_scores(
            NORM_ENTROPY, values, analysis.scores, analysis.groups, labels, analysis.correlations
        )
    return {name: _png(figure) for name, figure in drawn.items()}


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})  # the same figures, the same bytes
    return content.getvalue()


def _is_analysis(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "theia_analysis" in content


_ABSENT = "–"
_SHOWN_SKIPPED = 20

_NORMS = f"""Entropy H = −Σ p log p (nats) of the histogram of patch-token L2 norms. Norms are divided by √width and
counted in {NORM_BINS} equal bins over [0, {NORM_RANGE:g}), the same for all encoders; norms beyond count in the last
bin. In square brackets: 95 % interval over images (Poisson bootstrap). *Relative*: the same bins for norms divided by
the encoder's own median norm, so that the scale of features does not matter. *Outliers*: share of tokens longer than
{OUTLIER_FACTOR:g} medians (Darcet et al., 2024). Values compare only between encoders on the same images.
"""
_BINS = """The same entropy with other numbers of bins over the same range. Finer bins give higher values, so only those
of one column compare. Pairs of encoders that change places from column to column are named in a note above.
"""
_MAPS = """Dark is the lowest norm of each map, bright the highest; both stand below it, divided by √width. A map whose
norms differ by less than 0.01 % is called constant, and is all dark. The clipped maps show what single long tokens
outshine: all norms above the map's median look alike there.
"""
_PCA = """Explained-variance ratio of the principal components of all tokens, exact. *Area*: below the cumulative curve
over the share of components; 0.5 if all components explain alike, near 1 if few explain all.
"""
_SIMILARITY = """Cosine of each patch token to the mean token of its image: mean over tokens, then mean ± standard
deviation over images. Near 1: the tokens of an image are nearly the same.
"""
_CKA = """Linear CKA of mean-pooled patch tokens, unbiased, over minibatches of images in random order: 1 for the same
representation up to rotation and scale, about 0 for unrelated ones (small negative values are chance).
"""
_SCORES = """Pearson's r of figures with the score, with its 95 % interval (Fisher). Distilled and regular encoders are
correlated apart, as norms of one kind need not compare with those of the other. With few encoders the interval is wide.
"""


def page(analysis: Analysis, pictures: Sequence[str]) -> str:
    """The report in Markdown.

    Args:
        analysis: Analysis to report.
        pictures: Names of the image files beside it.
    """
    parts: list[str | None] = ["# Analysis of encoders\n", _subject(analysis), main_table(analysis, "github")]
    parts += [f"- {note}" for note in analysis.notes]
    parts += ["" if analysis.notes else None, "## Norms of patch tokens\n", _NORMS, _picture("norms.png", pictures)]
    parts += [_BINS, _bins(analysis)]
    if "norm_maps.png" in pictures:
        parts += ["## Norm maps\n", _MAPS, _picture("norm_maps.png", pictures)]
        parts.append(f"Images, from left to right: {_names(analysis.measured.maps.images)}.\n")
    parts += ["## Principal components\n", _PCA, _picture("pca.png", pictures), _components(analysis)]
    parts += ["## Similarity to the mean token\n", _SIMILARITY, _picture("similarity.png", pictures)]
    if "cka.png" in pictures:
        parts += ["## Which encoders are alike\n", _CKA, _picture("cka.png", pictures)]
        parts += _nearest(analysis)
    if analysis.correlations:
        parts += ["## Correlation with the score\n", _SCORES, _picture("scores.png", pictures), _correlations(analysis)]
    if analysis.skipped:
        parts += ["## Unreadable images\n", _skipped(analysis)]
    return "\n".join(part for part in parts if part is not None).rstrip() + "\n"


def main_table(analysis: Analysis, style: str = "simple") -> str:
    """The figures that are one number per encoder.

    Args:
        analysis: Analysis to report.
        style: Name of a format of tabulate: ``"simple"`` for a terminal, ``"github"`` for Markdown.
    """
    headers = ["encoder", "width", "grid", "norm entropy", "relative", "outliers", "PCA area", "cosine to mean"]
    rows = []
    for name, one in analysis.measured.encoders.items():
        interval = "" if one.entropy.low is None else f" [{one.entropy.low:.3f}, {one.entropy.high:.3f}]"
        spread = "" if one.similarity.std is None else f" ± {one.similarity.std:.3f}"
        rows.append(
            [
                analysis.labels[name],
                str(one.width),
                "x".join(map(str, one.grid)),
                f"{one.entropy.value:.3f}{interval}",
                _number(one.relative.entropy),
                _ABSENT if one.relative.outliers is None else f"{one.relative.outliers:.2%}",
                _number(one.spectrum.area),
                _number(one.similarity.mean) + spread,
            ]
        )
    return _table(rows, headers, style)


def _subject(analysis: Analysis) -> str:
    skipped = f", {len(analysis.skipped)} more could not be read" if analysis.skipped else ""
    images = analysis.measured.images
    lines = [f"{images} image{'s' * (images != 1)}{skipped}.\n"]
    longer = [[analysis.labels[name], name] for name in analysis.measured.encoders if analysis.labels[name] != name]
    if longer:
        lines.append(_table(longer, ["called here", "encoder"], "github"))
    facts = [[name.replace("_", " "), str(value)] for name, value in analysis.provenance.items() if value is not None]
    if facts:
        lines.append(_table(facts, ["", ""], "github"))
    return "\n".join(lines)


def _bins(analysis: Analysis) -> str:
    rows = [
        [analysis.labels[name], *(f"{one.entropy.by_bins[bins]:.3f}" for bins in BIN_COUNTS)]
        for name, one in analysis.measured.encoders.items()
    ]
    return _table(rows, ["encoder", *(f"{bins} bins" for bins in BIN_COUNTS)], "github")


def _nearest(analysis: Analysis) -> list[str]:
    """For each distilled encoder, which of the others it is most like."""
    names = [*analysis.measured.encoders]
    lines = []
    for name, row in zip(names, analysis.measured.cka, strict=True):
        regular = {
            other: cka
            for other, cka in zip(names, row, strict=True)
            if cka is not None and analysis.groups[other] != DISTILLED
        }
        if analysis.groups[name] == DISTILLED and regular:
            order = sorted(regular, key=regular.__getitem__, reverse=True)
            likes = ", ".join(f"{analysis.labels[other]} ({regular[other]:.3f})" for other in order)
            lines.append(f"- {analysis.labels[name]} is most like, in this order: {likes}.")
    return [*lines, ""] if lines else []


def _components(analysis: Analysis) -> str:
    rows = []
    for name, one in analysis.measured.encoders.items():
        counts = [_ABSENT if count is None else str(count) for count in (one.spectrum.for_90, one.spectrum.for_99)]
        rows.append([analysis.labels[name], str(one.width), *counts, _number(one.spectrum.area)])
    return _table(rows, ["encoder", "components", "for 90 %", "for 99 %", "area"], "github")


def _correlations(analysis: Analysis) -> str:
    rows = []
    for one in analysis.correlations:
        interval = _ABSENT if one.low is None else f"{one.low:.2f} to {one.high:.2f}"
        rows.append([one.figure, one.group, str(one.n), _number(one.r), interval])
    return _table(rows, ["figure", "encoders", "how many", "r", "95 % interval"], "github")


def _skipped(analysis: Analysis) -> str:
    lines = [f"- `{sample_id}`: {reason}" for sample_id, reason in analysis.skipped[:_SHOWN_SKIPPED]]
    rest = len(analysis.skipped) - _SHOWN_SKIPPED
    return "\n".join([*lines, f"- and {rest} more, in `analysis.json`"] if rest > 0 else lines)


def _picture(name: str, pictures: Sequence[str]) -> str | None:
    return f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" if name in pictures else None


def _names(ids: Iterable[str]) -> str:
    return ", ".join(f"`{sample_id}`" for sample_id in ids)


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.3f}"


def _table(rows: Iterable[Sequence[str]], headers: Sequence[str], style: str) -> str:
    # A bar inside a cell would end it.
    cells = [[cell.replace("|", "\\|") if style == "github" else cell for cell in row] for row in rows]
    return str(tabulate(cells, headers, tablefmt=style, disable_numparse=True)) + "\n"
