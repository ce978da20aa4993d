"""Whether a figure of encoders goes with how well they do: Pearson's correlation with scores of the user."""

import csv
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from theia.errors import ConfigError
from theia.utils.estimates import correlation

DISTILLED, REGULAR = "distilled", "regular"


@dataclass(frozen=True)
class Score:
    """What a user knows of an encoder.

    Attributes:
        value: For instance its mean reward.
        group: Encoders to be compared among themselves; ``None`` to go by kind: distilled or regular.
    """

    value: float
    group: str | None = None


@dataclass(frozen=True)
class PearsonR:
    """Pearson's coefficient of a figure and the score, over the encoders of a group.

    Attributes:
        figure: Name of the figure.
        group: Group of the encoders, or ``"all"``.
        n: Number of encoders.
        r: The coefficient, in ``[-1, 1]``; ``None`` if either side is constant, or with fewer than three encoders, as
            there is always a line through two.
        low: Lower end of its 95 % interval (Fisher's transformation); ``None`` with fewer than four.
        high: Upper end.
    """

    figure: str
    group: str
    n: int
    r: float | None
    low: float | None
    high: float | None


def read_scores(path: Path, encoders: Collection[str]) -> dict[str, Score]:
    """Scores by encoder out of a CSV file with the columns ``encoder``, ``score`` and, if wanted, ``group``.

    Args:
        path: The file.
        encoders: Names as in the analysis; lines of others are left out.

    Raises:
        ConfigError: If the file cannot be read, has other columns, a score that is no finite number, an encoder twice,
            or none of the encoders.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"The scores {path} cannot be read: {error}. Give a CSV file: encoder,score[,group]."
        ) from error
    missing = {"encoder", "score"} - set(columns)
    if missing:
        raise ConfigError(
            f"{path} has no column {' and no '.join(sorted(missing))}. Its first line: {','.join(columns)}."
        )
    scores: dict[str, Score] = {}
    for number, line in lines:
        name = (line["encoder"] or "").strip()
        value = _number(line["score"])
        if value is None or name in scores:
            what = f"{name!r} a second time" if name in scores else f"the score {line['score']!r}, which is no number"
            raise ConfigError(f"Line {number} of {path} has {what}. Correct it.")
        scores[name] = Score(value, (line.get("group") or "").strip() or None)
    found = {name: score for name, score in scores.items() if name in encoders}
    if not found:
        raise ConfigError(
            f"{path} has a score of none of the encoders. Names must be as in --encoders: {', '.join(encoders)}; "
            f"the file has: {', '.join(scores) or 'none'}."
        )
    return found


def correlations(
    figures: Mapping[str, Mapping[str, float | None]], scores: Mapping[str, float], groups: Mapping[str, str]
) -> list[PearsonR]:
    """Correlation of each figure with the score, over all encoders and over each group.

    Args:
        figures: By name of the figure, its value for each encoder; ``None`` where it is not defined.
        scores: Score of each encoder; those without one are left out.
        groups: Group of each encoder.

    Source: Theia, figures 7 and 11, which correlate distilled and regular models apart.
    """
    found = []
    names = sorted({groups[encoder] for encoder in scores})
    for figure, values in figures.items():
        for group in names if len(names) == 1 else [*names, "all"]:
            pairs = [
                (value, scores[encoder])
                for encoder, value in values.items()
                if value is not None and encoder in scores and group in (groups[encoder], "all")
            ]
            line = correlation([x for x, _ in pairs], [y for _, y in pairs])
            r, low, high = (None, None, None) if line is None else (line.r, line.low, line.high)
            found.append(PearsonR(figure, group, len(pairs), r, low, high))
    return found


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
