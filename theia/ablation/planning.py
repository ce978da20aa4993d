"""From what a user asks for to the runs of a sweep, each parsed and checked against its store before any starts."""

import json
import logging
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from theia.ablation.grid import Options, Row, TeacherSets, arguments_of, expand, flat, refuse_idle, refuse_reserved
from theia.ablation.sweep_run import Run
from theia.errors import ConfigError
from theia.scoring.contract import Scorer, data_of
from theia.utils.arguments import comma_list

if TYPE_CHECKING:
    from theia.data.datamodule import FeatureData

logger = logging.getLogger(__name__)

Parse = Callable[[Sequence[str]], dict[str, Any]]
"""Gives all options of ``theia fit``, as plain values, for some arguments; raises ConfigError if it refuses them."""

# The options under 'data' that decide which images a row uses and how they are drawn; its teachers do not.
_OF_IMAGES = ("store", "val_split", "holdout", "fraction", "weights", "batch_size", "image_sizes", "teachers_per_step")


def split_arguments(argv: Sequence[str], own: set[str]) -> tuple[list[str], list[str]]:
    """Tells the arguments of ``theia ablate`` from those of ``theia fit``, whose options have a dot in their name.

    Args:
        argv: Arguments after ``theia ablate``.
        own: Names of the options of ``theia ablate``.

    Returns:
        Arguments of ``theia ablate``, and those of ``theia fit``.

    Raises:
        ConfigError: If an option belongs to neither, or a value to no option.
    """
    mine: list[str] = []
    theirs: list[str] = []
    to, option, values = mine, "", 0
    for token in argv:
        if token.startswith("--"):
            option, values = token.partition("=")[0], int("=" in token)
            name = option[2:].rstrip("+")
            to = theirs if "." in name and name.partition(".")[0] not in own else mine
            if to is mine and name.partition(".")[0] not in own:
                raise ConfigError(
                    f"'theia ablate' has no option {option}; --help lists them. If it is one of 'theia fit', type "
                    f"--options.{name}; only those with a dot, such as --trainer.max_epochs, are typed as they are."
                )
        else:
            values += 1
            if to is mine and values > 1:
                after = f"a second value of {option}" if option else "not the value of an option"
                raise ConfigError(f"{token!r} is {after}. Separate several values with commas, without blanks.")
        to.append(token)
    return mine, theirs


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """A YAML loader that refuses a key given twice, instead of keeping the last, and a key that is not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and not isinstance(self.construct_object(key), str):
                mark = key.start_mark
                raise ConfigError(
                    f"{mark.name}, line {mark.line + 1}: YAML does not read the name {key.value} as text; it takes a "
                    "word such as On for a truth value. Put it in quotes."
                )
        names = [key.value for key, _ in node.value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            mark = node.start_mark
            raise ConfigError(
                f"{mark.name} has {repeated[0]!r} twice, in the part from line {mark.line + 1} on. Rename one."
            )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def check_sweep_file(path: Path) -> None:
    """Checks the keys of a sweep file, of which YAML itself accepts any.

    Raises:
        ConfigError: If a mapping has a key twice, or one that is not text.
    """
    with path.open() as file:
        yaml.load(file, _StrictLoader)  # a SafeLoader


def select_rows(rows: list[Row], only: str | list[str] | None) -> list[Row]:
    """Selects rows by name.

    Args:
        rows: All rows of the sweep.
        only: A name, which may have commas in it, or several names; all rows without any.

    Raises:
        ConfigError: If there is no row of such a name.
    """
    known = [row.name for row in rows]
    names = [name for name in known if name == only] or comma_list(only)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--only: there is no row {unknown[0]!r}. Rows: {'; '.join(known)}.")
    return [row for row in rows if row.name in names] if names else rows


class Stores:
    """The feature stores of a sweep, each of which is opened once."""

    def __init__(self) -> None:
        self._opened: dict[str, FeatureData] = {}

    def open(self, data: Mapping[str, Any]) -> "FeatureData":
        """Opens the store of a row, with all teachers that are finished in it; warns of those that are not.

        Args:
            data: The row's options of ``theia fit`` under ``data``.

        Raises:
            StoreError: If there is no store, it is damaged, or no teacher in it is finished.
        """
        # They import torch and Lightning, which take seconds; 'theia ablate --help' does without.
        from theia.data.datamodule import FeatureData
        from theia.store.reader import FeatureStore

        if "class_path" in data:
            raise ConfigError(
                f"A sweep needs a feature store, but data is {data['class_path']}. Leave the class out: FeatureData "
                "reads one."
            )
        options = {name: data[name] for name in _OF_IMAGES}
        key = json.dumps(options, sort_keys=True)
        if key not in self._opened:
            store = FeatureStore(data["store"])
            held_out = data["val_split"] if data["val_split"] in store.splits else "train"
            finished = store.finished_teachers(("train", held_out))
            unfinished = [name for name in store.teachers("train") if name not in finished]
            if unfinished and finished:
                logger.warning(
                    "Left out, since the store %s does not have all of their features: %s.",
                    store.root, ", ".join(unfinished),
                )  # fmt: skip
            self._opened[key] = FeatureData(teachers=finished or None, **options)
        return self._opened[key]

    def provenance(self) -> dict[str, Any]:
        """Where the features came from, over all stores, as plain values."""
        found = [data.provenance() for data in self._opened.values()]
        teachers: dict[str, Any] = {}
        for name, teacher in [pair for one in found for pair in one["teachers"].items()]:
            # Random weights must not go unnoticed behind a teacher of the same name in another store.
            if name not in teachers or teacher["weights"] == "random":
                teachers[name] = teacher
        digests = dict.fromkeys(one["manifest_sha256"] for one in found)
        return {"manifest_sha256": ", ".join(digests), "teachers": teachers}

    def caveats(self) -> list[str]:
        """Sentences that a reader of the figures must know."""
        random = [name for name, teacher in self.provenance()["teachers"].items() if teacher["weights"] == "random"]
        if not random:
            return []
        return [
            f"These teachers have random weights: {', '.join(random)}. They carry no knowledge; the figures only show "
            "that the sweep works."
        ]


class Planner:
    """Resolves the configs of a sweep.

    Args:
        parse: Parses arguments of ``theia fit``.
        stores: The stores of the sweep.
        base: Config file of ``theia fit`` that all rows start from.
        options: Dotted options of ``theia fit`` for all rows, from the sweep file.
        typed: Arguments of ``theia fit`` for all rows, from the command line.

    Raises:
        ConfigError: If the options set what the sweep itself sets.
    """

    def __init__(self, parse: Parse, stores: Stores, base: str | None, options: Options, typed: Sequence[str]) -> None:
        self._parse = parse
        self._stores = stores
        self._base = base
        self._common = [*flat(options), *(word[2:].partition("=")[0] for word in typed if word.startswith("--"))]
        self.arguments = [*(["--config", base] if base else []), *arguments_of(options), *typed]
        refuse_reserved(self._common, "The sweep")

    def rows(
        self,
        rows: Mapping[str, Options] | None,
        teachers: TeacherSets | None,
        product: Mapping[str, Sequence[Any]] | None,
    ) -> list[Row]:
        """The rows of the grid; see :func:`theia.ablation.grid.expand`.

        Raises:
            ConfigError: If there is no row, or the options for all rows are refused or have no effect.
            StoreError: If sets of teachers are asked for and the store cannot be used.
        """
        config = self._resolve([], "the base of the sweep")
        if config["ckpt_path"] is not None:
            raise ConfigError(f"The base {self._base} sets ckpt_path, which the sweep itself sets. Leave it out.")
        # Only sets of teachers depend on the store; each row may have a store of its own.
        pool = list(self._stores.open(config["data"]).teacher_specs) if teachers else []
        found = expand(rows, teachers, product, pool)
        refuse_idle(self._common, found)
        return found

    def runs(self, rows: Sequence[Row], seeds: Sequence[int], out: Path, scorers: Mapping[str, Scorer]) -> list[Run]:
        """One run for each row and seed.

        Args:
            rows: Rows of the grid.
            seeds: Seeds of each row.
            out: Folder of the sweep.
            scorers: The scorers by name.

        Raises:
            ConfigError: If ``theia fit`` refuses the options of a row, or they do not go together, or a store lacks
                teachers.
            StoreError: If a store cannot be used, or lacks the covariances that the normaliser of a row needs.
        """
        from theia.models.scaler import NEED_COVARIANCE  # imports torch, for which --help should not wait

        configs = {row.name: self._resolve(arguments_of(row.options), f"row {row.name!r}") for row in rows}
        self._name_teachers(configs)
        _warn_of_equals(configs)
        runs, scored_on = [], data_of(scorers)
        for row in rows:
            config = configs[row.name]
            data = self._stores.open(config["data"])
            _check_training(config, data, row.name)
            steps = _steps(config, data.trained_on)
            if config["model"]["normalizer"] in NEED_COVARIANCE:
                data.covariances()
            for seed in seeds:
                folder = out / row.name / f"seed_{seed}"
                runs.append(
                    Run(
                        row=row.name, seed=seed, folder=folder, options=row.options,
                        config=_with_seed(config, seed, folder), steps=steps, scorers=tuple(scorers),
                        store_sha256=data.store.manifest_sha256, scorer_data=scored_on,
                    )
                )  # fmt: skip
        return runs

    def _resolve(self, arguments: Sequence[str], whose: str) -> dict[str, Any]:
        """All options of ``theia fit`` after the options for all rows and some more, which win."""
        try:
            return self._parse([*self.arguments, *arguments])
        except ConfigError as error:
            raise ConfigError(f"'theia fit' does not take the options of {whose}: {error}") from error

    def _name_teachers(self, configs: Mapping[str, dict[str, Any]]) -> None:
        """Writes the teachers of each row into its config; by default all of its store."""
        missing: dict[str, dict[str, list[str]]] = {}  # rows by store and teacher
        for name, config in configs.items():
            data = config["data"]
            there = self._stores.open(data).teacher_specs
            data["teachers"] = list(there) if data["teachers"] is None else comma_list(data["teachers"])
            for teacher in data["teachers"]:
                if teacher not in there:
                    missing.setdefault(data["store"], {}).setdefault(teacher, []).append(name)
        if missing:
            raise ConfigError("\n".join(_what_is_missing(store, teachers) for store, teachers in missing.items()))


def _what_is_missing(store: str, teachers: Mapping[str, Sequence[str]]) -> str:
    wanted = "; ".join(f"{teacher} (of {', '.join(rows)})" for teacher, rows in teachers.items())
    command = f"theia extract --store {shlex.quote(store)} --teachers {','.join(teachers)} --images ..."
    return (
        f"The store {store} lacks teachers of this sweep, or does not have all of their features: {wanted}. Leave out "
        f"these rows, or extract the teachers: {command}"
    )


def _warn_of_equals(configs: Mapping[str, Mapping[str, Any]]) -> None:
    alike: dict[str, list[str]] = {}
    for name, config in configs.items():
        alike.setdefault(json.dumps(config, sort_keys=True, default=str), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            logger.warning("These rows are the same training, done %d times: %s.", len(names), "; ".join(names))


def _check_training(config: Mapping[str, Any], data: "FeatureData", row: str) -> None:
    """Raises errors that the training of a row would raise when its turn comes.

    The model is built on no device, which takes neither memory nor weights. It is checked as for a CPU; which device
    the training will have may not be known here.
    """
    import torch

    from theia.data.sampler import check_drawn
    from theia.errors import ShapeError
    from theia.training.distillation import Distillation

    teachers = {name: data.teacher_shapes[name] for name in config["data"]["teachers"]}
    try:
        with torch.device("meta"):
            model = Distillation(**{**config["model"], "teachers": teachers})
        check_drawn(list(teachers), data.teachers_per_step)
        data.check_training(1)
        model.check_steps(data, torch.device("cpu"))
    except (ConfigError, ShapeError) as error:
        raise ConfigError(f"'theia fit' does not take row {row!r}: {error}") from error


def _with_seed(config: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    trainer = config["trainer"]
    # The output goes to a log file, in which a progress bar would be noise.
    bars = False if trainer["enable_progress_bar"] is None else trainer["enable_progress_bar"]
    return {
        **config,
        "seed_everything": seed,
        "run_folder": str(folder),
        "trainer": {**trainer, "enable_progress_bar": bars},
        "data": {**config["data"], "seed": seed},
    }


def _steps(config: Mapping[str, Any], images: int) -> int:
    """Optimisation steps of a whole training on so many images."""
    trainer = config["trainer"]
    batches = images // config["data"]["batch_size"]
    # A float of at most 1.0 is a share, anything else a number of batches. Lightning prefers overfit_batches if not 0.
    limit = trainer["overfit_batches"] or trainer["limit_train_batches"]
    if isinstance(limit, int) or (limit is not None and limit > 1):
        batches = min(batches, int(limit))
    elif limit is not None:
        batches = int(batches * limit)
    steps_per_epoch = math.ceil(batches / trainer["accumulate_grad_batches"])
    epochs, most = trainer["max_epochs"], trainer["max_steps"]
    if epochs == -1:
        return int(most)
    if epochs is None:
        return int(1000 * steps_per_epoch if most == -1 else most)  # Lightning's default
    return int(epochs * steps_per_epoch if most == -1 else min(epochs * steps_per_epoch, most))
