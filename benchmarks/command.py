"""What the benchmarks' command lines share: commands, and checks that are made before minutes are spent."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from theia.cli.main import carry_out
from theia.cli.parser import Parser
from theia.errors import ConfigError
from theia.utils.files import check_folder


def check_folders(results: Path, folder: Path | None = None) -> None:
    """Checks that files can be written into the folders.

    Args:
        results: Folder for the JSON, which is made when the JSON is written.
        folder: Folder for temporary data; ``None`` for the system's temporary folder.

    Raises:
        ConfigError: If there is no such folder, or it cannot be written.
    """
    check_folder(results, "--results")
    if folder is None:
        return
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Make it, or give another one with --folder.")
    check_folder(folder, "--folder")


def run_command(
    module: str, description: str, commands: Mapping[str, Callable[..., str]], argv: Sequence[str] | None
) -> int:
    """Runs one of several commands and prints what it returns.

    Args:
        module: Name of the package, as in ``python -m MODULE``.
        description: What the package is for, in one sentence.
        commands: Functions by the name of their command. ``report`` takes its arguments without their names.
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    parser = Parser(prog=f"python -m {module}", description=description)
    added = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, function in commands.items():
        about = inspect.getdoc(function) or ""
        command = Parser(description=about.partition("\n\nArgs:")[0])
        command.add_function_arguments(function, as_positional=name == "report")
        added.add_subcommand(name, command, help=about.partition("\n")[0])

    def chosen() -> None:
        config = parser.parse_args(argv)
        print(commands[config.command](**config[config.command].as_dict()))

    return carry_out(module, chosen)
