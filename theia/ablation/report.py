"""The report of a sweep: a page to read, a picture, a table for spreadsheets, and everything as JSON."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from theia.ablation.figure import draw
from theia.ablation.summary import ENTROPY, RowSummary, Summary
from theia.utils.estimates import Correlation, Estimate
from theia.utils.files import jsonable, write_whole

PICTURE = "report.png"
_ABSENT = "–"
_LACKING = ("failed", "unfinished", "lost")

# The main table has these beside the score; a wider one is hard to read. All other scores are in a second table.
_HEADLINES = (
    "readout/explained_variance",
    "classification/linear_probe_accuracy",
    "classification/knn_accuracy",
    "dynamics/plan_error",
    "dynamics/motion_error",
    "dense/depth_rmse",
    "dense/mean_iou",
)

_AID = """Each row is a set of teachers and options; each seed is one student that was trained with them.
`{score}` ranks the rows ({direction}; {chosen}). The figure after ± is half of the 95 % confidence interval of the
mean over seeds (Student's t). It reflects the spread of trainings, not that of images or tasks.
"""

_TRANSFER = """How well a linear map reads each teacher's features out of the frozen student: explained variance on
held-out images, mean over seeds. Bold means that the student was distilled from that teacher.
"""


def main_table(summary: Summary, style: str = "simple") -> str:
    """Table of ranks, scores, differences from the reference and the most telling other scores.

    Args:
        summary: What the report shows.
        style: Table format of tabulate: ``"simple"`` for a terminal, ``"github"`` for Markdown.
    """
    others = [name for name in _headlines(summary) if name != summary.sort_by]
    headers = [
        "rank",
        "row",
        "distilled from",
        "seeds",
        f"**{summary.sort_by}**" if style == "github" else summary.sort_by,
    ]
    headers += (
        ["difference", "p", *(["p, Holm"] if _corrected(summary) else [])] if summary.reference is not None else []
    )
    headers += ["norm entropy"] if ENTROPY in summary.columns and summary.sort_by != ENTROPY else []
    rows = []
    for row in summary.rows:
        line = [str(summary.rank(row) or _ABSENT), row.name, ", ".join(row.teachers), _seeds(row)]
        line.append(_estimate(row.columns.get(summary.sort_by)))
        if summary.reference is not None:
            line += _difference(row, summary)
        if "norm entropy" in headers:
            line.append(_estimate(row.columns.get(ENTROPY)))
        rows.append([*line, *(_estimate(row.columns.get(name)) for name in others)])
    return _table(rows, [*headers, *others], style)


def page(summary: Summary, provenance: Mapping[str, Any]) -> str:
    """The report in Markdown; for the arguments see :func:`write_report`."""
    direction = "higher is better" if summary.higher_is_better(summary.sort_by) else "lower is better"
    aid = _AID.format(score=summary.sort_by, direction=direction, chosen=summary.chosen)
    parts = ["# Sweep\n", _random(provenance), aid, main_table(summary, "github"), *_notes(summary, provenance)]
    parts.append(f"![Scores, transfer and norm entropy]({PICTURE})\n")
    if summary.readable:
        parts += ["## Transfer\n", _TRANSFER, _transfer(summary)]
    if ENTROPY in summary.columns and summary.sort_by != ENTROPY:
        parts += ["## Norm entropy\n", _correlation(summary.entropy, summary.sort_by, direction)]
    others = _others(summary)
    if others:
        rows = [[row.name, *(_estimate(row.columns.get(name)) for name in others)] for row in summary.rows]
        parts += [
            "## Other scores\n",
            _table(rows, ["row", *others], "github"),
            "Scores for each teacher are in `report.csv`.\n",
        ]
    return "\n".join(part for part in [*parts, "## What was run\n", *_what_was_run(provenance)] if part)


def _random(provenance: Mapping[str, Any]) -> str:
    names = [name for name, teacher in _teachers(provenance).items() if teacher.get("weights") == "random"]
    if not names:
        return ""
    return (
        f"**Teachers with random weights: {', '.join(names)}. They carry no knowledge, so the figures below only "
        "show that the sweep works, not which teachers are good.**\n"
    )


def _notes(summary: Summary, provenance: Mapping[str, Any]) -> list[str]:
    notes = []
    if summary.reference is not None:
        holm = "; Holm's correction allows for the number of these tests" if _corrected(summary) else ""
        notes.append(
            f"Differences are from `{summary.reference}`, over the seeds that both rows have; p is that of a paired t "
            f"test, and missing with only one such seed or where all differences are equal{holm}."
        )
    elif provenance.get("reference"):
        notes.append(f"No run of the reference `{provenance['reference']}` is finished, so no row is compared with it.")
    if not any(len(row.values) > 1 or None in row.values for row in summary.rows):
        notes.append(
            "**One value per row gives no confidence intervals, so a difference may be chance.** Train more seeds into "
            "the same folder, with `--seeds 0,1,2`; finished runs are kept."
        )
    if not all(row.values for row in summary.rows):
        notes.append(f"Rows without a rank lack the score `{summary.sort_by}`.")
    if (
        summary.sort_by.startswith("test/")
        and summary.sort_by != ENTROPY
        and len({row.teachers for row in summary.rows}) > 1
    ):
        notes.append(
            f"**`{summary.sort_by}` is measured by each student's own translators, on its own teachers: it does not "
            "compare rows that differ in teachers.** Scores of the readout do."
        )
    odd = [f"{run.row}, seed {run.seed}: {name}" for run in summary.scored for name, value in run.scores.items()
           if not math.isfinite(value)]  # fmt: skip
    if odd:
        notes.append(f"Not finite, and left out: {'; '.join(odd)}.")
    notes += provenance.get("caveats", [])
    for key in _LACKING:
        if provenance.get(key):
            notes.append(f"Not in this report, since {key}: {'; '.join(map(str, provenance[key]))}.")
    return [f"{note}\n" for note in notes]


def _transfer(summary: Summary) -> str:
    rows = []
    for row in summary.rows:
        cells = [f"{value:.3f}" if value is not None else _ABSENT for value in summary.transfer(row)]
        named = zip(summary.readable, cells, strict=True)
        rows.append([row.name, *(f"**{cell}**" if name in row.teachers else cell for name, cell in named)])
    return _table(rows, ["distilled from \\ read out", *summary.readable], "github")


def _correlation(found: Correlation | None, score: str, direction: str) -> str:
    over = f"Correlation of the norm entropy of patch tokens with `{score}` ({direction}), over means of rows: "
    if found is None:
        return over + "undefined; it takes three rows whose values are not all the same.\n"
    interval = "no interval with fewer than four rows"
    if found.low is not None and found.high is not None:
        interval = f"95 % interval {found.low:.2f} to {found.high:.2f}"
    return f"{over}Pearson's r = {found.r:.2f} ({interval}; {found.n} rows).\n"


def _what_was_run(provenance: Mapping[str, Any]) -> list[str]:
    shown = [(name, value) for name, value in provenance.items() if name not in ("store", "caveats", *_LACKING)]
    facts = [(name.replace("_", " "), _list(value)) for name, value in shown if value not in (None, "", [], {})]
    digest = (provenance.get("store") or {}).get("manifest_sha256")
    facts += [("sha256 of the store's manifest", str(digest))] if digest else []
    facts += [(key, str(len(provenance[key]))) for key in _LACKING if key in provenance]
    teachers = [
        [name, *(_list(teacher.get(key) or _ABSENT) for key in ("weights", "revision", "licence"))]
        for name, teacher in _teachers(provenance).items()
    ]
    return [
        _table(facts, ["", ""], "github") if facts else "Nothing was recorded.\n",
        _table(teachers, ["teacher", "weights", "revision", "licence"], "github") if teachers else "",
    ]


def _seeds(row: RowSummary) -> str:
    """Number of seeds and the seeds, since a lone 0 would look like a number."""
    return f"{len(row.seeds)} (seed{'s' * (len(row.seeds) > 1)} {_list(row.seeds)})" if row.seeds else _ABSENT


def _teachers(provenance: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    teachers: Mapping[str, Mapping[str, Any]] = (provenance.get("store") or {}).get("teachers") or {}
    return teachers


def _headlines(summary: Summary) -> list[str]:
    external = [name for name in summary.columns if name.startswith("external/")]
    return [*external, *(name for name in _HEADLINES if name in summary.columns)]


def _others(summary: Summary) -> list[str]:
    """Names of scores that belong to no teacher and are in no other table."""
    shown = {*_headlines(summary), summary.sort_by, ENTROPY}
    return [name for name in summary.columns if name.count("/") < 2 and name not in shown]


def _corrected(summary: Summary) -> bool:
    return len(summary.holm) > 1


def _difference(row: RowSummary, summary: Summary) -> list[str]:
    found = row.difference
    corrected = [_p(summary.holm.get(row.name))] if _corrected(summary) else []
    if found is None:
        return ["reference" if row.name == summary.reference else _ABSENT, _ABSENT, *corrected]
    return [_estimate(found, "+"), _p(found.p), *corrected]


def _p(value: float | None) -> str:
    return _ABSENT if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _estimate(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return _ABSENT
    half = found.half_width
    digits = _digits(max(abs(found.mean), half or 0))
    return f"{found.mean:{sign}{digits}}" + ("" if half is None else f" ± {half:{digits}}")


def _digits(size: float) -> str:
    """Format of figures of a size: no more decimals than can be read, and never a small one as 0."""
    return ",.0f" if size >= 1000 else ".1e" if 0 < size < 0.0005 else ".3f"


def _list(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_list(part)}" for name, part in value.items())
    return ", ".join(map(_list, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(rows: Iterable[Sequence[str]], headers: Sequence[str], style: str) -> str:
    # A vertical bar inside a cell would end the cell.
    cells = [[cell.replace("|", "\\|") if style == "github" else cell for cell in row] for row in rows]
    return str(tabulate(cells, headers, tablefmt=style, disable_numparse=True)) + "\n"


def write_report(folder: Path, summary: Summary, provenance: Mapping[str, Any]) -> list[Path]:
    """Writes ``report.md``, ``report.csv``, ``report.png`` and ``report.json``, each whole or not at all.

    Args:
        folder: Folder of the sweep, made if need be.
        summary: What the report shows.
        provenance: Where the figures come from, as plain values. These have their own place in the report: ``store``
            (``manifest_sha256`` and, by name, ``teachers`` with ``weights``, ``revision`` and ``licence``),
            ``versions``, and the lists ``caveats``, ``failed``, ``unfinished`` and ``lost``. Anything else is listed
            by its name.

    Returns:
        The files, the page first.

    Raises:
        FileError: If one cannot be written, for instance on a full disk; those before it are written.
    """
    picture = io.BytesIO()
    draw(summary).savefig(picture, format="png", metadata={"Software": None})  # the same scores, the same bytes
    contents = {
        "report.md": page(summary, provenance).encode(),
        "report.csv": _csv(summary).encode(),
        PICTURE: picture.getvalue(),
        "report.json": _json(summary, provenance).encode(),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def _csv(summary: Summary) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("mean", "low", "high")
    writer.writerow(["row", "teachers", "seeds", *(f"{name} {end}" for name in summary.columns for end in ends)])
    for row in summary.rows:
        found = [row.columns.get(name) for name in summary.columns]
        figures = [getattr(one, end) if one else None for one in found for end in ends]
        writer.writerow([row.name, "+".join(row.teachers), " ".join(map(str, row.seeds)), *figures])
    return text.getvalue()


def _json(summary: Summary, provenance: Mapping[str, Any]) -> str:
    content = asdict(summary)
    runs = content.pop("scored")
    for row, found in zip(content["rows"], summary.rows, strict=True):
        # Names of JSON are strings, and a value of the whole row has no seed.
        row["values"] = [{"seed": seed, "value": value} for seed, value in found.values.items()]
        row["transfer"] = dict(zip(summary.readable, summary.transfer(found), strict=True))
    plain = jsonable(
        {
            **content,
            "higher_is_better": summary.higher_is_better(summary.sort_by),
            "runs": runs,
            "provenance": provenance,
        }
    )
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"
