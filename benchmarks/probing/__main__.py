"""``python -m benchmarks.probing``: probes frozen encoders, prints one table, writes one JSON."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.probing.classification import classification
from benchmarks.probing.dense import dense
from theia.cli.main import carry_out
from theia.cli.parser import Parser
from theia.encoder.named import FORMS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    parser = Parser(prog="python -m benchmarks.probing", description="Probes frozen encoders.")
    commands = parser.add_subcommands(required=True)
    functions: dict[str, Callable[..., Path]] = {"classification": classification, "dense": dense}
    for name, function in functions.items():
        about = inspect.getdoc(function) or ""
        one = Parser(description=about.partition("\n\nArgs:")[0])
        # jsonargparse takes one word for a list; a comma may be part of an encoder's name.
        one.add_argument("--encoders", nargs="+", required=True, metavar="NAME", help=FORMS.replace("\n", "; "))
        one.add_function_arguments(function, skip={"encoders"})
        commands.add_subcommand(name, one, help=about.partition("\n")[0])

    def work() -> None:
        options = parser.parse_args(argv)
        functions[options.subcommand](**options[options.subcommand].as_dict())

    return carry_out("benchmarks.probing", work)


if __name__ == "__main__":
    sys.exit(main())
