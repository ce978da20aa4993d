"""What keeps runs of one report from being compared like with like."""

from collections.abc import Mapping, Sequence
from typing import Any

from theia.ablation.run import Run

# Options that decide which images a student is scored on.
_HELD_OUT = ("store", "val_split", "holdout")
_SHOWN = 4


def caveats(runs: Sequence[Run]) -> list[str]:
    """Sentences for a reader of the figures.

    Args:
        runs: Those of the report, which have scores.

    Returns:
        One for each thing that differs between runs and should not, or that some lack.
    """
    found = []
    for name in _HELD_OUT:
        values = {run.name: run.config["data"].get(name) for run in runs}
        if len(set(map(str, values.values()))) > 1:
            found.append(f"**Scored on different images, so not to be compared: `data.{name}` is {_groups(values)}.**")
    environments = {run.name: _flat(run.environment()) for run in runs}
    for name in dict.fromkeys(name for environment in environments.values() for name in environment):
        values = {run: environment.get(name, "unknown") for run, environment in environments.items()}
        if len(set(map(str, values.values()))) > 1:
            found.append(f"Trained with different {name}: {_groups(values)}.")
    for run in runs:
        lacking = [] if run.report is None else [name for name in run.scorers if name not in run.report["scorers"]]
        if lacking:
            found.append(f"{run.name} has no scores of {', '.join(lacking)} yet; the others of it are shown.")
    return found


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is said of the store elsewhere, and the images, which are an option."""
    plain = {name: value for name, value in environment.items() if name not in ("store", "images", "versions")}
    return {**environment.get("versions", {}), **plain}


def _groups(values: Mapping[str, Any]) -> str:
    """Which run has which value, the most usual first."""
    by_value: dict[str, list[str]] = {}
    for run, value in values.items():
        by_value.setdefault(str(value), []).append(run)
    usual, *others = sorted(by_value.items(), key=lambda group: -len(group[1]))
    parts = [f"{usual[0]} in {len(usual[1])} run{'s' * (len(usual[1]) != 1)}"]
    for value, names in others:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{value} in {'; '.join(names[:_SHOWN])}{more}")
    return ", ".join(parts)
