"""The grid of a sweep: named rows, sets of teachers, and products of options, expanded to rows."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from theia.errors import ConfigError

TEACHERS = "data.teachers"

# Options that the sweep itself sets for each run.
RESERVED = ("run_folder", "seed_everything", "ckpt_path", "config", "data.seed", "trainer.default_root_dir", "scorers")
# What the folder of a sweep holds besides the folders of its rows.
_TAKEN = ("slurm", "sweep.json", "report.md", "report.csv", "report.png", "report.json")
_NAME = re.compile(r"[\w+=,-][\w.+=, -]*")

Options = Mapping[str, Any]
TeacherSets = str | list[str | list[str]]


@dataclass(frozen=True)
class Row:
    """One line of the report: a set of options, trained once for each seed.

    Attributes:
        name: Unique name in the sweep, and name of the folder.
        options: Dotted options of ``theia fit`` in which the row differs from the base config.
    """

    name: str
    options: Options


def flat(options: Options, prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def arguments_of(options: Options) -> list[str]:
    """Arguments of ``theia fit`` for dotted options."""
    compact = json.JSONEncoder(separators=(",", ":"))
    return [f"--{name}={value if isinstance(value, str) else compact.encode(value)}" for name, value in options.items()]


def expand(
    rows: Mapping[str, Options] | None = None,
    teachers: TeacherSets | None = None,
    product: Mapping[str, Sequence[Any]] | None = None,
    pool: Sequence[str] = (),
) -> list[Row]:
    """Expands a grid to its rows.

    Args:
        rows: Dotted options by name of the row.
        teachers: Sets of teachers, one further row for each; see :func:`teacher_sets`.
        product: Values by dotted option; each row is repeated for each combination.
        pool: Names of the teachers that sets are made of.

    Returns:
        Rows in the given order, with unique names.

    Raises:
        ConfigError: If there is no row, two rows have the same name, or a row sets what the sweep itself sets.
    """
    found = [Row(str(name), options) for name, options in (rows or {}).items()]
    found += [Row(name, {TEACHERS: members}) for name, members in teacher_sets(teachers, pool).items()]
    for name, values in (product or {}).items():
        if not values:
            raise ConfigError(f"product.{name} is {values!r}; it must be a list with at least one value.")
    if product:
        parts = [[(option, value) for value in values] for option, values in product.items()]
        combinations = [dict(choice) for choice in itertools.product(*parts)]
        found = [_combine(row, combination) for row in found or [Row("", {})] for combination in combinations]
    if not found:
        raise ConfigError("The sweep has no rows. Name some under 'rows', 'teachers' or 'product'.")
    for row in found:
        _check(row)
    # Some file systems do not distinguish upper case from lower case.
    names = [row.name.casefold() for row in found]
    repeated = [row.name for row, name in zip(found, names, strict=True) if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"Several rows of the sweep are called {repeated[0]!r}. Give each its own name.")
    return found


def teacher_sets(sets: TeacherSets | None, pool: Sequence[str]) -> dict[str, list[str]]:
    """Makes sets of teachers.

    Args:
        sets: ``"singles"``, ``"all"``, ``"leave_one_out"`` (which includes the set of all), ``"all_pairs"``,
            ``"powerset"`` (without the empty set), or a list of these words and of lists of teachers.
        pool: Names of the teachers to choose from.

    Returns:
        Teachers by name of the set, in the given order and without repetitions. The names are ``all``, ``all-NAME`` and
        ``NAME+NAME``.

    Raises:
        ConfigError: If a word is unknown, or a set is empty or names a teacher twice.
    """
    found: dict[frozenset[str], tuple[str, list[str]]] = {}
    for item in [sets] if isinstance(sets, str) else sets or []:
        if isinstance(item, str):
            if item not in SETS:
                hint = f" A set of your own is a list inside the list: [[{item}]]." if item in pool else ""
                raise ConfigError(
                    f"There are no sets of teachers called {item!r}. Choose from: {', '.join(SETS)}.{hint}"
                )
            named = [(_name(members, pool), members) for members in SETS[item](list(pool))]
        else:
            named = [("+".join(item), item)]
        for name, members in named:
            if not members or len(set(members)) < len(members):
                raise ConfigError(
                    f"{members} is not a set of teachers: it is empty, or has a teacher twice. Correct it."
                )
            found.setdefault(frozenset(members), (name, members))
    return dict(found.values())


def _leave_one_out(pool: list[str]) -> list[list[str]]:
    return [pool, *([name for name in pool if name != left_out] for left_out in pool if len(pool) > 1)]


def _of_size(pool: list[str], sizes: Iterable[int]) -> list[list[str]]:
    return [list(members) for size in sizes for members in itertools.combinations(pool, size)]


SETS: dict[str, Callable[[list[str]], list[list[str]]]] = {
    "singles": lambda pool: _of_size(pool, [1]),
    "all": lambda pool: [pool],
    "leave_one_out": _leave_one_out,
    "all_pairs": lambda pool: _of_size(pool, [2]),
    "powerset": lambda pool: _of_size(pool, range(1, len(pool) + 1)),
}


def _name(members: list[str], pool: Sequence[str]) -> str:
    missing = [name for name in pool if name not in members]
    if len(members) > 1 and not missing:
        return "all"
    if len(members) > 2 and len(missing) == 1:
        return f"all-{missing[0]}"
    return "+".join(members)


def _combine(row: Row, options: Options) -> Row:
    twice = row.options.keys() & options.keys()
    if twice:
        raise ConfigError(f"Row {row.name!r} and the product both set {sorted(twice)[0]}. Let one of them set it.")
    values = ",".join(f"{name.rsplit('.', 1)[-1]}={_text(value)}" for name, value in options.items())
    return Row(f"{row.name},{values}" if row.name else values, {**row.options, **options})


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value))
    return str(value).replace(":", "-")  # timm:NAME: a row is a folder, too


def _check(row: Row) -> None:
    if not _NAME.fullmatch(row.name):
        raise ConfigError(
            f"A row cannot be called {row.name!r}, since a folder is called the same. Use letters, digits, blanks and "
            "any of + - _ . = , and name rows yourself, under 'rows', where values cannot serve as names."
        )
    if row.name.casefold() in _TAKEN:
        raise ConfigError(f"A row cannot be called {row.name!r}: the sweep has a file of that name. Rename the row.")
    refuse_reserved(row.options, f"Row {row.name!r}")


def refuse_idle(names: Iterable[str], rows: Sequence[Row]) -> None:
    """Refuses options for all rows that have no effect, since every row sets them itself.

    Args:
        names: Dotted names of the options for all rows.
        rows: Rows of the grid.

    Raises:
        ConfigError: Names the first such option.
    """
    for name in names:
        if all(name in flat(row.options) for row in rows):
            raise ConfigError(
                f"Every row of the sweep sets {name} itself, so setting it for all rows has no effect. Leave it out."
            )


def refuse_reserved(names: Iterable[str], who: str) -> None:
    """Refuses options that the sweep itself sets.

    Args:
        names: Dotted names of options.
        who: What sets them, as the message says: a row, or the sweep as a whole.

    Raises:
        ConfigError: Names the first such option.
    """
    reserved = [name for name in names if name in RESERVED]
    if reserved:
        raise ConfigError(f"{who} sets {reserved[0]}, which the sweep itself sets. Leave it out.")
