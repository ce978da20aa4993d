"""What a sweep will run: every row's config parsed and checked against the store, before the first one starts."""

import contextlib
import io
import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from theia.ablation.grid import Row, arguments_of
from theia.ablation.run import Run
from theia.cli import lightning
from theia.cli.data import CLASS
from theia.cli.parser import OF_FIT_MAY_BE_EMPTY, settle
from theia.data.datamodule import FeatureData
from theia.errors import ConfigError
from theia.store.reader import FeatureStore
from theia.utils.arguments import comma_list

logger = logging.getLogger(__name__)

# Options of the data that decide which images there are; the teachers and batches of a row do not.
_OF_IMAGES = ("store", "val_split", "holdout", "fraction")


class Stores:
    """The feature stores that a sweep reads, each looked into once."""

    def __init__(self) -> None:
        self._opened: dict[tuple[Any, ...], FeatureData] = {}

    def open(self, data: Mapping[str, Any]) -> FeatureData:
        """The images and teachers that a row's data have; a teacher that is unfinished is left out, and it is said.

        Args:
            data: The options of ``theia fit`` under ``data``.

        Raises:
            ConfigError: If the data are of a class that reads no store.
            StoreError: If there is no store, or it is damaged, or no teacher is finished.
        """
        if CLASS in data:
            raise ConfigError(
                f"A sweep needs a feature store, but data is {data[CLASS]}. Leave the class out: FeatureData reads one."
            )
        key = tuple(data[name] for name in _OF_IMAGES)
        if key not in self._opened:
            store = FeatureStore(data["store"])
            held_out = data["val_split"] if data["val_split"] in store.splits else "train"
            finished = store.finished_teachers(("train", held_out))
            unfinished = [name for name in store.teachers("train") if name not in finished]
            if unfinished and finished:
                logger.warning(
                    "Left out, since the store %s has not all of their features: %s.", store.root, ", ".join(unfinished)
                )
            options = dict(zip(_OF_IMAGES, key, strict=True))
            self._opened[key] = FeatureData(teachers=finished or None, **options)
        return self._opened[key]

    def provenance(self) -> dict[str, Any]:
        """What the features are; of all stores, where rows have stores of their own."""
        found = [data.provenance() for data in self._opened.values()]
        teachers: dict[str, Any] = {}
        for name, teacher in [pair for one in found for pair in one["teachers"].items()]:
            # A warning must not get lost behind a teacher of the same name in another store.
            if name not in teachers or teacher["weights"] == "random":
                teachers[name] = teacher
        digests = dict.fromkeys(one["manifest_sha256"] for one in found)
        return {"manifest_sha256": ", ".join(digests), "teachers": teachers}

    def caveats(self) -> list[str]:
        """What a reader of the figures must know."""
        random = [name for name, teacher in self.provenance()["teachers"].items() if teacher["weights"] == "random"]
        if not random:
            return []
        return [
            f"These teachers have random weights: {', '.join(random)}. They carry no knowledge; the figures only show "
            "that the sweep works."
        ]


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
    try:
        return settle(config, OF_FIT_MAY_BE_EMPTY)
    except ConfigError as error:
        raise ConfigError(f"'theia fit' does not take the options of {what}: {error}") from None


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
    missing: dict[tuple[str, str], list[str]] = {}
    for name, config in configs.items():
        data = config["data"]
        there = stores.open(data).teacher_specs
        data["teachers"] = list(there) if data["teachers"] is None else comma_list(data["teachers"])
        for teacher in data["teachers"]:
            if teacher not in there:
                missing.setdefault((data["store"], teacher), []).append(name)
    if missing:
        raise ConfigError("\n".join(_lack(store, missing) for store in dict.fromkeys(store for store, _ in missing)))
    alike: dict[str, list[str]] = {}
    for name, config in configs.items():
        alike.setdefault(json.dumps(config, sort_keys=True, default=str), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            logger.warning("These rows are the same training, done %d times: %s.", len(names), "; ".join(names))
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


def _lack(store: str, missing: Mapping[tuple[str, str], Sequence[str]]) -> str:
    of_store = {teacher: names for (other, teacher), names in missing.items() if other == store}
    lines = "; ".join(f"{teacher} (of {', '.join(names)})" for teacher, names in of_store.items())
    command = f"theia extract --store {shlex.quote(store)} --teachers {','.join(of_store)} --images ..."
    return (
        f"The store {store} lacks teachers of this sweep, or has not all of their features: {lines}. Leave out these "
        f"rows, or extract them: {command}"
    )


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
    # Up to 1.0 a share, above or as an int a number of batches. Lightning lets overfit_batches win if it is not 0.
    limit = trainer["overfit_batches"] or trainer["limit_train_batches"]
    if isinstance(limit, int) or (limit is not None and limit > 1):
        batches = min(batches, int(limit))
    elif limit is not None:
        batches = int(batches * limit)
    of_epoch = math.ceil(batches / trainer["accumulate_grad_batches"])
    epochs, most = trainer["max_epochs"], trainer["max_steps"]
    if epochs == -1:
        return int(most)
    if epochs is None:
        return int(1000 * of_epoch if most == -1 else most)  # Lightning's default
    return int(epochs * of_epoch if most == -1 else min(epochs * of_epoch, most))
