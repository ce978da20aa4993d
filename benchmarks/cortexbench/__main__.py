"""``python -m benchmarks.cortexbench COMMAND``: what an encoder is worth to a robot, in a simulator."""

import inspect
import sys
from collections.abc import Callable, Sequence

from benchmarks.cortexbench.collect import collect
from benchmarks.cortexbench.commands import export, report, run
from benchmarks.cortexbench.originals import import_originals
from theia.cli.main import carry_out
from theia.cli.parser import Parser

_PROG = "python -m benchmarks.cortexbench"
_COMMANDS: dict[str, Callable[..., str]] = {
    "collect": collect, "import": import_originals, "run": run, "report": report, "export": export,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    parser = Parser(prog=_PROG, description="What an encoder is worth to a robot, in a simulator.")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, function in _COMMANDS.items():
        about = inspect.getdoc(function) or ""
        command = Parser(description=about.partition("\n\nArgs:")[0])
        command.add_function_arguments(function, as_positional=name == "report")
        commands.add_subcommand(name, command, help=about.partition("\n")[0])

    def chosen() -> None:
        config = parser.parse_args(argv)
        print(_COMMANDS[config.command](**config[config.command].as_dict()))

    return carry_out("benchmarks.cortexbench", chosen)


if __name__ == "__main__":
    sys.exit(main())
