"""What `theia test` leaves behind: a JSON, and a table of each teacher's figures before and after training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from theia.utils.files import write_whole

# Metric as logged -> heading.
_SHOWN = {"cosine": "cosine", "explained_variance": "explained variance"}


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the figures as JSON, whole or not at all: that the file is there says that the test is finished.

    Args:
        path: JSON file.
        report: Plain values.

    Raises:
        FileError: If it cannot be written, for instance on a full disk.
    """
    write_whole(path, json.dumps(report, indent=2) + "\n")


def table(teachers: list[str], before: Mapping[str, float] | None, after: Mapping[str, float]) -> str:
    """Held-out figures per teacher.

    Args:
        teachers: Names, one row each.
        before: Metrics of the untrained student by logged name, ``test/<metric>/<teacher>``; ``None`` to leave out.
        after: The same of the trained one.

    Returns:
        A table as text.
    """
    stages = [("before", before), ("after", after)] if before is not None else [("", after)]
    headers = ["teacher"] + [f"{heading} {stage}".strip() for heading in _SHOWN.values() for stage, _ in stages]
    rows = [
        [teacher] + [values[f"test/{metric}/{teacher}"] for metric in _SHOWN for _, values in stages]
        for teacher in teachers
    ]
    return str(tabulate(rows, headers=headers, floatfmt=".3f"))
