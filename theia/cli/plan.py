"""What a sweep will run: every row's config parsed and checked against the store, before the first one starts."""

import contextlib
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from theia.ablation.grid import Row
from theia.ablation.run import Run
from theia.cli import lightning
from theia.data.datamodule import FeatureDataModule
from theia.errors import ConfigError
from theia.lists import comma_list

# Options of the data that decide which images there are; the teachers and batches of a row do not.
_OF_IMAGES = ("store", "val_split", "holdout", "fraction")


class Stores:
    """The feature stores that a sweep reads, each looked into once."""

    def __init__(self) -> None:
        self._opened: dict[tuple[Any, ...], FeatureDataModule] = {}

    def open(self, data: Mapping[str, Any]) -> FeatureDataModule:
        """The images and teachers that a row's data have.

        Args:
            data: The options of ``theia fit`` under ``data``.

        Raises:
            StoreError: If there is none, or it is unfinished or damaged.
        """
        key = tuple(data[name] for name in _OF_IMAGES)
        if key not in self._opened:
            self._opened[key] = FeatureDataModule(**dict(zip(_OF_IMAGES, key, strict=True)))
        return self._opened[key]

    def provenance(self) -> dict[str, Any]:
        """What the features are; of the first store, where rows have stores of their own."""
        return next(iter(self._opened.values())).provenance()

    def caveats(self) -> list[str]:
        """What a reader of the figures must know."""
        random = [name for name, teacher in self.provenance()["teachers"].items() if teacher["weights"] == "random"]
        if not random:
            return []
        return [
            f"These teachers have random weights: {', '.join(random)}. They carry no knowledge; the figures only show "
            "that the sweep works."
        ]


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """Dotted options as arguments of ``theia fit``."""
    compact = json.JSONEncoder(separators=(",", ":"))
    return [f"--{name}={value if isinstance(value, str) else compact.encode(value)}" for name, value in options.items()]


def resolve(arguments: Sequence[str], what: str) -> dict[str, Any]:
    """All options of ``theia fit``, as it would take them.

    Args:
        arguments: Of the command line.
        what: Whose they are, for messages.

    Raises:
        ConfigError: If ``theia fit`` would refuse them.
    """
    said, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
            lightning.main(["fit", *arguments, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            reason = " ".join(complaint.getvalue().rpartition("error: ")[2].split())
            raise ConfigError(f"'theia fit' does not take the options of {what}: {reason}") from None
    config: dict[str, Any] = yaml.safe_load(said.getvalue())
    return config


def plan(
    rows: Sequence[Row], seeds: Sequence[int], arguments: Sequence[str], out: Path, scorers: tuple[str, ...],
    stores: Stores,
) -> list[Run]:  # fmt: skip
    """The runs of a sweep.

    Args:
        rows: Of the grid.
        seeds: Of each row.
        arguments: Of ``theia fit``, for all rows; a row's own options win.
        out: Folder of the sweep.
        scorers: Names of what is scored.
        stores: Where their features are.

    Raises:
        ConfigError: Names the row and its option, or all teachers that the store lacks.
        StoreError: If a store cannot be used.
    """
    configs = {row.name: resolve([*arguments, *arguments_of(row.options)], f"row {row.name!r}") for row in rows}
    missing: dict[str, list[str]] = {}
    for name, config in configs.items():
        data = config["data"]
        there = stores.open(data).teacher_specs
        data["teachers"] = list(there) if data["teachers"] is None else comma_list(data["teachers"])
        for teacher in data["teachers"]:
            if teacher not in there:
                missing.setdefault(teacher, []).append(name)
    if missing:
        first = next(iter(configs.values()))["data"]["store"]
        lines = "; ".join(f"{teacher} (of {', '.join(names)})" for teacher, names in missing.items())
        raise ConfigError(
            f"The store {first} lacks teachers of this sweep: {lines}. Add them: theia extract --store {first} "
            f"--teachers {','.join(missing)} --images ..., or leave out these rows."
        )
    return [
        Run(
            row=row.name, seed=seed, folder=folder, options=row.options,
            config=_of_seed(configs[row.name], seed, folder),
            steps=_steps(configs[row.name], stores), scorers=scorers,
            store_sha256=stores.open(configs[row.name]["data"]).store.manifest_sha256,
        )
        for row in rows
        for seed in seeds
        for folder in [out / row.name / f"seed_{seed}"]
    ]  # fmt: skip


def _of_seed(config: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    trainer = config["trainer"]
    # A log file shows no bars.
    bars = False if trainer["enable_progress_bar"] is None else trainer["enable_progress_bar"]
    return {
        **config,
        "seed_everything": seed,
        "run_folder": str(folder),
        "trainer": {**trainer, "enable_progress_bar": bars},
        "data": {**config["data"], "seed": seed},
    }


def _steps(config: Mapping[str, Any], stores: Stores) -> int:
    """Optimisation steps of a training."""
    trainer, data = config["trainer"], config["data"]
    batches = stores.open(data).trained_on // data["batch_size"]
    if isinstance(trainer["limit_train_batches"], int):
        batches = min(batches, trainer["limit_train_batches"])
    of_epoch = math.ceil(batches / trainer["accumulate_grad_batches"])
    epochs, most = trainer["max_epochs"], trainer["max_steps"]
    if epochs is None:
        return int(1000 * of_epoch if most == -1 else most)  # Lightning's default
    return int(epochs * of_epoch if most == -1 else min(epochs * of_epoch, most))


def text(runs: Sequence[Run], arguments: Sequence[str]) -> str:
    """The runs, their commands, what is finished, and the cost.

    Args:
        runs: Of the sweep.
        arguments: Of ``theia fit``, for all rows.
    """
    lines = [
        tabulate(
            [(run.row, run.seed, _state(run), run.steps, "+".join(run.teachers)) for run in runs],
            ("row", "seed", "state", "steps", "teachers"),
        )
    ]
    lines += ["", "Each is trained, then tested; trained by:"]
    for run in runs:
        own = [*arguments_of(run.options), f"--seed_everything={run.seed}", f"--data.seed={run.seed}"]
        lines.append(shlex.join(["theia", "fit", *arguments, *own, f"--run_folder={run.folder}"]))
    return "\n".join([*lines, "", _cost(runs)])


def _state(run: Run) -> str:
    if run.finished:
        return "finished"
    step, _ = run.progress()
    return f"at step {step}" if step else "to do"


def _cost(runs: Sequence[Run]) -> str:
    finished = [run for run in runs if run.finished]
    left = [(run, run.steps - run.progress()[0]) for run in runs if not run.finished]
    images = sum(
        steps * run.config["data"]["batch_size"] * run.config["trainer"]["accumulate_grad_batches"]
        for run, steps in left
    )
    line = (
        f"{len(finished)} of {len(runs)} runs are finished. To do: {len(left)} runs, "
        f"{sum(steps for _, steps in left):,} steps, {images:,} images"
    )
    rates = [rate for run in finished if (rate := run.speed().get("images_per_s"))]
    if not left:
        return line + "."
    if not rates:
        return line + ". How long that takes is known after the first run."
    rate = sum(rates) / len(rates)
    return (
        f"{line}: {images / rate / 3600:.1f} hours one after the other at {rate:,.0f} images/s as in those, and tests."
    )
