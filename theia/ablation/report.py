"""The files of a report: a page to read, a picture, a table for spreadsheets, and everything as JSON."""

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
from theia.utils.files import write_whole
from theia.utils.json import jsonable


def write_report(folder: Path, summary: Summary, statement: Mapping[str, Any]) -> list[Path]:
    """Writes ``report.md``, ``report.csv``, ``report.png`` and ``report.json``, each whole or not at all.

    Args:
        folder: Of the sweep; made if need be.
        summary: What the runs gave.
        statement: What was run, as plain values. ``store`` (``manifest_sha256`` and, by name, ``teachers`` with
            ``weights``, ``revision`` and ``licence``), ``versions``, and the lists ``caveats``, ``failed``,
            ``unfinished`` and ``lost`` are shown each in a way of its own; whatever else there is, by its name.

    Returns:
        The files, the page first.

    Raises:
        FileError: If one cannot be written, for instance on a full disk; those before it are there.
    """
    picture = io.BytesIO()
    draw(summary).savefig(picture, format="png", metadata={"Software": None})  # the same scores, the same bytes
    contents = {
        "report.md": page(summary, statement).encode(),
        "report.csv": _csv(summary).encode(),
        PICTURE: picture.getvalue(),
        "report.json": _json(summary, statement).encode(),
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


def _json(summary: Summary, statement: Mapping[str, Any]) -> str:
    content = asdict(summary)
    runs = content.pop("scored")
    for row, found in zip(content["rows"], summary.rows, strict=True):
        # Names of JSON are strings, and a value of the whole row has no seed.
        row["values"] = [{"seed": seed, "value": value} for seed, value in found.values.items()]
        row["transfer"] = dict(zip(summary.readable, summary.transfer(found), strict=True))
    plain = jsonable(
        {**content, "higher_is_better": summary.higher_is_better(summary.sort_by), "runs": runs, "statement": statement}
    )
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


PICTURE = "report.png"
_ABSENT = "–"
_LACKING = ("failed", "unfinished", "lost")

# Beside the score, as far as there are any; a wider table is hard to read. All others follow in a second one.
_HEADLINES = (
    "readout/explained_variance",
    "classification/linear_probe_accuracy",
    "classification/knn_accuracy",
)

_AID = """Each row is a student that was distilled from other teachers or with other options, each seed one training.
`{score}` ranks the rows ({direction}; {chosen}). The figure after ± is half of the 95 % interval of the
mean over seeds (Student's t): the spread of trainings, not that of images or tasks.
"""


def main_table(summary: Summary, style: str = "simple") -> str:
    """Ranks, scores, differences to the reference and the most telling other scores.

    Args:
        summary: What the runs gave.
        style: Name of a format of tabulate: ``"simple"`` for a terminal, ``"github"`` for Markdown.
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
        line = [str(summary.rank(row) or _ABSENT), row.name, ", ".join(row.teachers), _list(row.seeds)]
        line.append(_estimate(row.columns.get(summary.sort_by)))
        if summary.reference is not None:
            line += _difference(row, summary)
        if "norm entropy" in headers:
            line.append(_estimate(row.columns.get(ENTROPY)))
        rows.append([*line, *(_estimate(row.columns.get(name)) for name in others)])
    return _table(rows, [*headers, *others], style)


def page(summary: Summary, statement: Mapping[str, Any]) -> str:
    """The report in Markdown; arguments as in :func:`theia.ablation.report.write_report`."""
    direction = "higher is better" if summary.higher_is_better(summary.sort_by) else "lower is better"
    aid = _AID.format(score=summary.sort_by, direction=direction, chosen=summary.chosen)
    parts = ["# Sweep\n", _random(statement), aid, main_table(summary, "github"), *_notes(summary, statement)]
    parts.append(f"![Scores, transfer and norm entropy]({PICTURE})\n")
    if summary.readable:
        parts += ["## Transfer\n", _TRANSFER, _transfer(summary)]
    if ENTROPY in summary.columns and summary.sort_by != ENTROPY:
        parts += ["## Norm entropy\n", _correlation(summary.entropy, summary.sort_by, direction)]
    others = _others(summary)
    if others:
        rows = [[row.name, *(_estimate(row.columns.get(name)) for name in others)] for row in summary.rows]
        parts += ["## Other scores\n", _table(rows, ["row", *others], "github"), "Figures per teacher: `report.csv`.\n"]
    return "\n".join(part for part in [*parts, "## What was run\n", *_what_was_run(statement)] if part)


def _random(statement: Mapping[str, Any]) -> str:
    names = [name for name, teacher in _teachers(statement).items() if teacher.get("weights") == "random"]
    if not names:
        return ""
    return (
        f"**Teachers with random weights: {', '.join(names)}. They carry no knowledge, so the figures below only "
        "show that the sweep works, not which teachers are good ones.**\n"
    )


def _notes(summary: Summary, statement: Mapping[str, Any]) -> list[str]:
    notes = []
    if summary.reference is not None:
        holm = "; Holm's correction is for the number of these tests" if _corrected(summary) else ""
        notes.append(
            f"Differences are to `{summary.reference}`, over the seeds that both have; p is that of a paired t test, "
            f"and missing where there is one such seed or all differences are equal{holm}."
        )
    elif statement.get("reference"):
        notes.append(f"No run of the reference `{statement['reference']}` is finished, so nothing is compared with it.")
    if not any(len(row.values) > 1 or None in row.values for row in summary.rows):
        notes.append(
            "**With one value per row no intervals can be given, and a difference may be chance.** Train further seeds "
            "into the same folder: `--seeds 0,1,2`; finished runs are kept."
        )
    if not all(row.values for row in summary.rows):
        notes.append(f"Rows without a rank have no `{summary.sort_by}`.")
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
    notes += statement.get("caveats", [])
    for key in _LACKING:
        if statement.get(key):
            notes.append(f"Not in here, since {key}: {'; '.join(map(str, statement[key]))}.")
    return [f"{note}\n" for note in notes]


_TRANSFER = """How well each teacher can be read out of the frozen student by a linear map: explained variance on
held-out images, mean over seeds. Bold: the student was distilled from that teacher.
"""


def _transfer(summary: Summary) -> str:
    rows = []
    for row in summary.rows:
        cells = [f"{value:.3f}" if value is not None else _ABSENT for value in summary.transfer(row)]
        named = zip(summary.readable, cells, strict=True)
        rows.append([row.name, *(f"**{cell}**" if name in row.teachers else cell for name, cell in named)])
    return _table(rows, ["distilled from \\ read out", *summary.readable], "github")


def _correlation(found: Correlation | None, score: str, direction: str) -> str:
    over = f"Norm entropy of patch tokens with `{score}` ({direction}), over means of rows: "
    if found is None:
        return over + "no correlation can be given; it needs three rows whose values are not all the same.\n"
    interval = "no interval with fewer than four rows"
    if found.low is not None and found.high is not None:
        interval = f"95 % interval {found.low:.2f} to {found.high:.2f}"
    return f"{over}Pearson's r = {found.r:.2f} ({interval}; {found.n} rows).\n"


def _what_was_run(statement: Mapping[str, Any]) -> list[str]:
    shown = [(name, value) for name, value in statement.items() if name not in ("store", "caveats", *_LACKING)]
    facts = [(name.replace("_", " "), _list(value)) for name, value in shown if value not in (None, "", [], {})]
    digest = (statement.get("store") or {}).get("manifest_sha256")
    facts += [("store, manifest's sha256", str(digest))] if digest else []
    facts += [(key, str(len(statement[key]))) for key in _LACKING if key in statement]
    teachers = [
        [name, *(_list(teacher.get(key) or _ABSENT) for key in ("weights", "revision", "licence"))]
        for name, teacher in _teachers(statement).items()
    ]
    return [
        _table(facts, ["", ""], "github") if facts else "Nothing was recorded.\n",
        _table(teachers, ["teacher", "weights", "revision", "licence"], "github") if teachers else "",
    ]


def _teachers(statement: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    teachers: Mapping[str, Mapping[str, Any]] = (statement.get("store") or {}).get("teachers") or {}
    return teachers


def _headlines(summary: Summary) -> list[str]:
    external = [name for name in summary.columns if name.startswith("external/")]
    return [*external, *(name for name in _HEADLINES if name in summary.columns)]


def _others(summary: Summary) -> list[str]:
    """Names of scores that are no teacher's and stand in no other table."""
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
    """How to write figures of a size: as many decimals as can be read, and never a small one as 0."""
    return ",.0f" if size >= 1000 else ".1e" if 0 < size < 0.0005 else ".3f"


def _list(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_list(part)}" for name, part in value.items())
    return ", ".join(map(_list, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(rows: Iterable[Sequence[str]], headers: Sequence[str], style: str) -> str:
    # A bar inside a cell would end it.
    cells = [[cell.replace("|", "\\|") if style == "github" else cell for cell in row] for row in rows]
    return str(tabulate(cells, headers, tablefmt=style, disable_numparse=True)) + "\n"
