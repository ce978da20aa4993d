"""What keeps runs of one report from being compared like with like."""

from collections.abc import Mapping, Sequence
from typing import Any

from theia.ablation.run import Run

# Options that decide which images a student is scored on, where the store is one and the same.
_HELD_OUT = ("val_split", "holdout")
_SHOWN = 4


def caveats(tested: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[str]:
    """Sentences for a reader of the figures.

    Args:
        tested: Runs with what ``theia test`` wrote of each.

    Returns:
        One for each thing that differs between runs and should not, or that some lack.
    """
    found = []
    stores = {run.name: report["store"]["manifest_sha256"][:12] for run, report in tested}
    if _differ(stores):
        found.append(
            f"**Scored on different stores, or on different states of one, so not to be compared: {_groups(stores)}. "
            "Start the sweep again with all rows: what is trained is only tested anew.**"
        )
    for name in _HELD_OUT:
        values = {run.name: run.config["data"].get(name) for run, _ in tested}
        if _differ(values):
            found.append(f"**Scored on different images, so not to be compared: `data.{name}` is {_groups(values)}.**")
    for name in ("scorer_images", "device", "precision"):
        values = {run.name: report.get(name) for run, report in tested}
        if _differ(values):
            found.append(f"Tested with different {name}: {_groups(values)}.")
    conditions = {run.name: _conditions(run.environment()) for run, _ in tested}
    for name in dict.fromkeys(name for one in conditions.values() for name in one):
        values = {run: one.get(name, "unknown") for run, one in conditions.items()}
        if _differ(values):
            found.append(f"Trained with different {name}: {_groups(values)}.")
    for run, report in tested:
        lacking = [name for name in run.scorers if name not in report["scorers"]]
        if lacking:
            found.append(f"{run.name} has no scores of {', '.join(lacking)} yet; the others of it are shown.")
    return found


def _conditions(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and the rest, without the store and the images, which are options."""
    plain = {name: value for name, value in environment.items() if name not in ("store", "images", "versions")}
    return {**environment.get("versions", {}), **plain}


def _differ(values: Mapping[str, Any]) -> bool:
    return len(set(map(str, values.values()))) > 1


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
