"""``theia extract``: runs teachers over images and fills a feature store."""

import logging
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from tabulate import tabulate

from theia import registry
from theia.cli.parser import Parser, as_one_word
from theia.errors import ConfigError, PluginError
from theia.extraction.config import ExtractConfig
from theia.teacher import Teacher
from theia.utils.files import check_folder

if TYPE_CHECKING:
    from theia.extraction.pipeline import ExtractedSplit

logger = logging.getLogger(__name__)

_TEACHER_OPTIONS = "teacher_options"
_OPTIONS = frozenset(field.name for field in fields(ExtractConfig)) - {_TEACHER_OPTIONS}
_OWN_OPTIONS = _OPTIONS | {"config", "help", "print_config"}


def main(argv: list[str]) -> int:
    """Runs ``theia extract``.

    Args:
        argv: Arguments after the command.

    Returns:
        Exit status.

    Raises:
        TheiaError: For the reasons given under :func:`theia.extraction.pipeline.extract`.
    """
    parser, found, broken = _build_parser()
    config = _to_config(parser.parse_args(as_one_word(argv, "--images")), found.keys(), broken)

    _refuse_idle(argv, found.keys() - set(config.teacher_names))
    check_folder(config.store, "--store")

    # Lightning takes seconds to import; --help does not need it.
    from theia.extraction.pipeline import extract

    try:
        splits = extract(config)
    except KeyboardInterrupt:
        print("Stopped. Whole shards are kept: run the same command again to go on.", file=sys.stderr)
        return 130
    if splits is not None:
        print(_summary(config, splits))
    return 0


def _refuse_idle(argv: Sequence[str], idle: Collection[str]) -> None:
    """Refuses typed options of teachers that are not asked for. A config that serves several runs may have them."""
    for option in [token for token in argv if token.startswith("--")]:
        name = option[2:].partition("=")[0].partition(".")[0]
        if name in idle:
            raise ConfigError(
                f"{option.partition('=')[0]} is about a teacher that --teachers does not name. Name {name} there, or "
                "leave this option out."
            )


def _summary(config: ExtractConfig, splits: "list[ExtractedSplit]") -> str:
    rows = [(part.name, part.listed - part.skipped, part.skipped) for part in splits]
    lines = [tabulate(rows, ("split", "images stored", "skipped"))]
    lines += [f"Skipped images and reasons: {part.skipped_list}" for part in splits if part.skipped]
    return "\n".join([*lines, f"Next: {_next_command(config)}"])


def _next_command(config: ExtractConfig) -> str:
    """The next command for the user: an extraction that the store still needs for training, or else the training."""
    from theia.store.reader import FeatureStore

    found = FeatureStore(config.store)
    store = str(config.store)
    for split, use in (("train", "students learn from"), ("val", "students are validated on")):
        finished = found.finished_teachers([split]) if split in found.splits else []
        missing = [name for name in config.teacher_names if name not in finished]
        # Without a validation split, some of the training images are held out.
        if missing and (split == "train" or split in found.splits):
            lacks = ["--split", split, "--teachers", ",".join(missing), "--store", store]
            return f"{shlex.join(['theia', 'extract', '--images', 'DIR', *lacks])}   (DIR: the images that {use})"
    has = ["--data.store", store, "--data.teachers", ",".join(config.teacher_names)]
    return f"{shlex.join(['theia', 'fit', '--config', 'CONFIG', *has])}   (CONFIG: one of configs/*.yaml, or your own)"


def _build_parser() -> tuple[Parser, dict[str, type[Teacher]], dict[str, PluginError]]:
    """Builds the parser, with the teachers whose options are in it, and the errors of those that cannot be loaded."""
    parser = Parser(
        prog="theia extract",
        description="Run teachers over images once and store their features. "
        "The same command again continues what was interrupted.",
    )
    parser.add_argument("--config", action="config", help="YAML file of options; of several, later ones win.")
    parser.add_class_arguments(ExtractConfig, skip={_TEACHER_OPTIONS})
    found, broken = registry.find_all()
    for name in sorted(_OWN_OPTIONS & found.keys()):
        del found[name]
        broken[name] = PluginError(
            f"Teacher {name!r} cannot be extracted: its options would stand under --{name}, which is an option of "
            "'theia extract' itself. Its distribution must rename it."
        )
    for name, teacher in found.items():
        parser.add_class_arguments(teacher, name, instantiate=False, fail_untyped=False)
    for name in broken.keys() - _OWN_OPTIONS:
        # A config with options of this teacher then leads to the teacher's own error and not to one of the parser.
        parser.add_argument(f"--{name}", type=dict[str, Any] | None, help="cannot be used; see 'theia teachers'")
    return parser, found, broken


def _to_config(arguments: Namespace, found: Collection[str], broken: Mapping[str, PluginError]) -> ExtractConfig:
    values = arguments.as_dict()
    options: dict[str, Any] = {name: values[name] for name in _OPTIONS}
    # Teachers whose constructors take no arguments have no section.
    options[_TEACHER_OPTIONS] = {name: values[name] for name in found if values.get(name)}
    config = ExtractConfig(**options)
    for name in config.teacher_names:
        if name in broken:
            raise broken[name]
        registry.find(name)
    for error in broken.values():
        logger.warning("%s", error)
    return config
