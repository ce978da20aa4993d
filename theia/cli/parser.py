"""The parser of Theia's own commands, and the rules for the values of every option."""

import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace, auto_cli
from jsonargparse.typing import register_type

from theia.encoder import FORMS
from theia.errors import ConfigError
from theia.utils.files import at_home

# Options of 'theia fit', 'validate' and 'test' that may be empty: Lightning's own, and scorers, which a config.yaml
# gives as '' where there are none.
OF_FIT_MAY_BE_EMPTY = ("trainer", "scorers")


Options = TypeVar("Options", Namespace, dict[str, Any])


# A comma may be part of an encoder's name or of a file name.
_SEVERAL_WORDS = ("--encoders", "--picture_ids")

# Other spellings of options, by command: earlier ones, or ones with dashes.
_ALIASES = {
    ("theia decode", "--encoder"): "--model",
    ("theia decode", "--teachers_side_by_side"): "--teachers-side-by-side",
    ("theia export", "--encoder"): "--ckpt",
}

_ENCODERS = f"""Names of encoders, with blanks between them; all are in memory together.
{"; ".join(f"{form} is {meaning}" for form, meaning in FORMS.items())}."""


class OneLineErrors(ArgumentParser):
    """The parser of jsonargparse, except that a command line that does not parse is answered in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See jsonargparse, which prints all options first."""
        if not self.exit_on_error:
            super().error(message, ex)
        failed = getattr(ex, "subcommand_parser", None) or self
        prog = failed.prog.replace(" [options]", "")
        self.exit(2, f"{prog}: {one_line(message, failed).rstrip('.')}. '{prog} --help' lists the options.\n")


def one_line(message: str, parser: ArgumentParser) -> str:
    """A message of jsonargparse in one line, with options as they are typed."""
    parts = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    # Any option with a class may be the path of a file with its options, too.
    said = [part for part in parts if not part.startswith("Expected a path but")] or parts
    text = re.sub(r'Parser key "([^"]+)":', r"--\1:", " ".join(said))
    # jsonargparse would send the user to what is no option.
    linked = r'Linked "(model\.\w+)" must be given via "data\.\w+"'
    text = re.sub(linked, r"--\1 comes from the data: leave it out", text)
    needed = re.fullmatch(r"(the following arguments are required: )(.*)", text)
    if needed is None:
        return text
    return needed[1] + ", ".join(_as_typed(name, parser) for name in needed[2].split(", "))


def _as_typed(name: str, parser: ArgumentParser) -> str:
    """An option as it is typed: with dashes unless it is positional, and without the name of its subcommand."""
    command, _, rest = name.partition(".")
    for action in parser._actions:
        if action.dest == name:
            return f"--{name}" if action.option_strings else name
        if action.dest == "subcommand" and action.choices is not None and command in action.choices:
            return _as_typed(rest, dict(action.choices)[command])
    return name


class Parser(OneLineErrors):
    """A parser for which ``--switch`` alone means ``--switch true``, and that settles values.

    An option that takes several words takes them separated by blanks.

    Attributes:
        may_be_empty: Dotted names of options that have a meaning when they are empty.
    """

    may_be_empty: Collection[str] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.allow_abbrev = False  # a misspelt option is not the beginning of another one

    def add_argument(self, *args: Any, **options: Any) -> Any:
        """See ``argparse``."""
        if args[0] in _SEVERAL_WORDS:
            options.pop("action", None)
            options |= {"type": str, "nargs": "+"}
        if args[0] == "--encoders":
            options["help"] = _ENCODERS
        alias = _ALIASES.get((getattr(self, "prog", ""), args[0]))  # a group of options has no command name
        action = super().add_argument(*args, *([alias] if alias else []), **options)
        if options.get("type") is bool:
            action.nargs, action.const = "?", True
        return action

    def parse_args(self, *args: Any, **options: Any) -> Namespace:  # type: ignore[override]  # hands on what it is given
        """See ``argparse``.

        Raises:
            ConfigError: For the reasons given under :func:`settle`.
        """
        config = super().parse_args(*args, **options)
        # A third party's teacher may have an option that is empty by default.
        by_default = [action.dest for action in self._actions if config.get(action.dest) == action.default]
        positional = [action.dest for action in self._actions if not action.option_strings]
        return settle(config, [*self.may_be_empty, *by_default], positional)


def as_one_word(argv: Sequence[str], option: str) -> list[str]:
    """A command line with several words behind an option as one list in YAML, which is what a parser takes."""
    if option not in argv:
        return list(argv)
    start = list(argv).index(option) + 1
    stop = next((place for place in range(start, len(argv)) if argv[place].startswith("--")), len(argv))
    if stop - start < 2:
        return list(argv)
    return [*argv[:start], json.dumps(argv[start:stop]), *argv[stop:]]


def call(
    functions: Sequence[Callable[..., int]],
    arguments: Sequence[str],
    prog: str,
    description: str | None = None,
    positional: bool = False,
) -> int:
    """Calls a function whose signature and docstring are a command line, or the one of several that is asked for.

    Args:
        functions: One function, or those that are subcommands.
        arguments: Arguments after the command.
        prog: Name of the command.
        description: What --help says of subcommands together; of one function, its docstring says it.
        positional: Whether arguments without a default are typed without their names.

    Returns:
        Exit status that the function gives.

    Raises:
        ConfigError: For the reasons given under :func:`settle`.
    """
    first = functions[0]
    if not inspect.signature(first).parameters:  # nor is there anything for a config file to say
        Parser(prog=prog, description=inspect.getdoc(first)).parse_args(list(arguments))
        return first()
    components: Any = list(functions)
    return int(
        auto_cli(
            components, args=list(arguments), as_positional=positional, prog=prog, description=description,
            parser_class=Parser,
        )
    )  # fmt: skip


def settle(config: Options, may_be_empty: Collection[str] = (), positional: Collection[str] = ()) -> Options:
    """Refuses empty values, and replaces a leading ``~`` with the home folder, wherever the values come from.

    A shell variable that is not set gives an empty text, which would mean the current folder, or all of something. A
    shell leaves ``~`` as it is after ``=`` and between quotes.

    Args:
        config: Parsed options of one command, possibly with those of a subcommand inside; may be a dict. It is changed.
        may_be_empty: Dotted names of options that may be empty, together with all options below them.
        positional: Names of options that are typed without their names.

    Returns:
        The same options.

    Raises:
        ConfigError: If a value, or a part of it, is an empty text or an empty list. The message names the first such
            option.
    """
    values = config if isinstance(config, dict) else vars(config)
    for name, value in values.items():
        if name == values.get("subcommand") and isinstance(value, Namespace):
            settle(value, may_be_empty, positional)
        else:
            values[name] = _settled(value, name, may_be_empty, positional)
    return config


class _EmptyPath(type(Path())):  # type: ignore[misc]  # a base that depends on the system
    """Stands for an empty text where a path is wanted, which pathlib would turn into the current folder."""


def _to_path(text: str) -> Path:
    return _EmptyPath() if _is_empty(text) else Path(text)


# jsonargparse registers its own, which older releases replace only when told to.
register_type(Path, str, _to_path, type_check=isinstance, fail_already_registered=False)


def _settled(value: Any, name: str, may_be_empty: Collection[str], positional: Collection[str]) -> Any:
    if _is_empty(value) and not any(name == one or name.startswith(f"{one}.") for one in may_be_empty):
        name = name.replace(".init_args.", ".")  # jsonargparse's name for the options of a class
        typed = name if name.partition(".")[0] in positional else f"--{name}"
        raise ConfigError(f"{typed} is empty. Is a shell variable unset? Give a value, or leave it out.")
    if isinstance(value, Namespace):
        for key, part in vars(value).items():
            setattr(value, key, _settled(part, f"{name}.{key}", may_be_empty, positional))
    elif isinstance(value, dict):
        return {key: _settled(part, f"{name}.{key}", may_be_empty, positional) for key, part in value.items()}
    elif isinstance(value, list):
        return [_settled(part, f"{name}.{place}", may_be_empty, positional) for place, part in enumerate(value)]
    elif isinstance(value, str):
        return at_home(value)
    elif isinstance(value, Path):
        return Path(at_home(str(value)))
    return value


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip(" \t\n,")
    return isinstance(value, _EmptyPath) or value == []
