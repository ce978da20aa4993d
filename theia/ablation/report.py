"""The files of a report: a page to read, a picture, a table for spreadsheets, and everything as JSON."""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from theia.ablation.figure import draw
from theia.ablation.page import PICTURE, page
from theia.ablation.summary import Summary
from theia.utils.files import write_whole


def write(folder: Path, summary: Summary, statement: Mapping[str, Any]) -> list[Path]:
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
    plain = _plain(
        {**content, "higher_is_better": summary.higher_is_better(summary.sort_by), "runs": runs, "statement": statement}
    )
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Without what JSON has no name for: figures that are not finite, tuples, paths."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
