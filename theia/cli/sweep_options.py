"""What is typed after ``theia ablate``, and what stands in a sweep file: taken apart, refused where it is unclear."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from theia.ablation.grid import Row
from theia.errors import ConfigError
from theia.utils.arguments import comma_list


def split(argv: Sequence[str], own: set[str]) -> tuple[list[str], list[str]]:
    """Arguments of this command, and those of ``theia fit``: the options with a dot, each with its value.

    Args:
        argv: Of the command line.
        own: Names of this command's options.

    Raises:
        ConfigError: If an option is neither's, or a value stands alone.
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
                    f"'theia ablate' has no option {option}; --help lists them. Options of 'theia fit' have a dot, as "
                    "--trainer.max_epochs has, or stand behind --options: --options.checkpoint_every."
                )
        else:
            values += 1
            if to is mine and values > 1:
                after = f"a second value of {option}" if option else "not the value of an option"
                raise ConfigError(f"{token!r} is {after}. Put commas between several values, and no blanks.")
        to.append(token)
    return mine, theirs


def only_of(rows: list[Row], only: str | list[str] | None) -> list[Row]:
    """The rows of those names, all if there are none; a name may have commas of its own.

    Raises:
        ConfigError: Names the first that is no row.
    """
    known = [row.name for row in rows]
    names = [name for name in known if name == only] or comma_list(only)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"only: {unknown[0]!r} is no row. There are: {'; '.join(known)}.")
    return [row for row in rows if row.name in names] if names else rows


def seeds_of(seeds: int | str | list[int]) -> list[int]:
    """Seeds as numbers.

    Raises:
        ConfigError: If one is none, or stands twice.
    """
    given = [str(seed) for seed in seeds] if isinstance(seeds, list) else comma_list(str(seeds))
    numbers = [int(seed) for seed in given if seed.isdecimal()]
    if not given or len(set(numbers)) < len(given) or max(numbers) >= 2**32:
        raise ConfigError(
            f"seeds is {seeds!r}; it must be one or some whole numbers below 2**32, each once: --seeds 0,1,2."
        )
    return numbers


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML in which a key that stands twice is an error, not the last of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and not isinstance(self.construct_object(key), str):
                mark = key.start_mark
                raise ConfigError(
                    f"{mark.name}, line {mark.line + 1}: the name {key.value} is no text for YAML, to which a "
                    "word such as On is a truth value. Put it in quotes."
                )
        names = [key.value for key, _ in node.value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            mark = node.start_mark
            raise ConfigError(f"{mark.name} names {repeated[0]!r} twice, from line {mark.line + 1} on. Rename one.")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def refuse_unclear_keys(path: Path) -> None:
    """Looks at the names in a sweep file, which YAML itself takes as they come.

    Raises:
        ConfigError: If one stands twice in one place, or is no text.
    """
    with path.open() as file:
        yaml.load(file, _StrictLoader)  # a SafeLoader
