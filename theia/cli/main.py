"""``theia COMMAND ...``: finds the command's module and loads nothing else."""

import argparse
import contextlib
import difflib
import importlib
import inspect
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TextIO

from theia.errors import ConfigError, TheiaError
from theia.utils.files import at_home, what_was_refused
from theia.version import __version__

_LIGHTNING = "theia.cli.lightning"


class Command(NamedTuple):
    """Where a command is and how it is called.

    Attributes:
        help: One line about it.
        module: Name of its module.
        functions: Functions of the module whose signatures are the command line; several are subcommands. A module that
            is named without functions parses its arguments itself, in ``main(argv)``.
        description: What --help says of several functions together.
        positional: Whether arguments that must be given are typed without their names.
    """

    help: str
    module: str
    functions: tuple[str, ...] = ()
    description: str | None = None
    positional: bool = False


COMMANDS = {
    "extract": Command("run teachers over images once and store their features", "theia.cli.extract"),
    "store": Command(
        "say what is in a feature store, verify every checksum of it, measure it, or copy it",
        "theia.cli.store",
        ("info", "verify", "statistics", "push", "pull"),
        "Say what is in a feature store, check that all of it is whole, measure it, or copy it to another place.",
        positional=True,
    ),
    "teachers": Command("list the installed teachers", "theia.cli.teachers", ("teachers",)),
    "fit": Command(
        "train a student on a feature store, with live teachers or on data of your own, or resume its training",
        _LIGHTNING,
    ),
    "validate": Command("print the held-out figures that fit logs, for any checkpoint; writes nothing", _LIGHTNING),
    "test": Command(
        "report on a checkpoint: beside the untrained student, with scorers; writes figures and a picture", _LIGHTNING
    ),
    "ablate": Command("train, score and compare students: which teachers, which loss, which size", "theia.cli.ablate"),
    "analyze": Command(
        "compare representations: norms, components, similarity, CKA; of any encoders",
        "theia.cli.analyze",
        ("analyze",),
    ),
    "probe": Command(
        "fit small heads to frozen features: classes, depth, normals, views, a robot's motion",
        "theia.cli.probe",
        ("classification", "dense", "dynamics"),
        "Fit small heads to the features of frozen encoders, and compare what they read out of them.",
    ),
    "decode": Command(
        "show what a student has learned: masks, depth, strokes, colours; images or video",
        "theia.cli.decode",
        ("decode",),
    ),
    "export": Command(
        "write a trained model for others: safetensors, ONNX, timm, the published layout",
        "theia.cli.export",
        ("export",),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; by default, those of the process.

    Returns:
        Exit status: that of :func:`carry_out`, or 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def find_and_run() -> int:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            near = difflib.get_close_matches(arguments[0], COMMANDS, 1)
            meant = f" Did you mean 'theia {near[0]}'?" if near else ""
            return _fail(f"theia: There is no command {arguments[0]!r}.{meant} 'theia --help' lists the commands.", 2)
        command = _parser().parse_args(arguments[:1]).command
        _log_to_stderr()
        return carry_out(f"theia {command}", lambda: _call(command, arguments[1:]))

    return carry_out("theia", find_and_run)


def _call(command: str, arguments: list[str]) -> int:
    found = COMMANDS[command]
    _check_configs(arguments)
    module = _import(found.module)
    if found.module == _LIGHTNING:  # whose commands share one parser
        return int(module.main([command, *arguments]))
    if not found.functions:
        return int(module.main(arguments))
    functions = [getattr(module, name) for name in found.functions]
    if not arguments and not inspect.signature(functions[0]).parameters:
        return int(functions[0]())  # without jsonargparse, which takes as long to import as all else but torch
    from theia.cli.parser import call

    return call(functions, arguments, f"theia {command}", found.description, found.positional)


def _check_configs(arguments: Sequence[str]) -> None:
    """Refuses a config file that is not there before torch is imported, which takes seconds."""
    for number, word in enumerate(arguments):
        option, equals, place = word.partition("=")
        if option not in ("--config", "-c"):
            continue
        place = place if equals else "".join(arguments[number + 1 : number + 2])
        # YAML itself may stand there instead of a file.
        is_file = place and not place.startswith("-") and not re.search(r"[:{\n]", place)
        if is_file and not Path(at_home(place)).exists():
            raise ConfigError(
                f"{option} {place}: there is no such file. Give a YAML file; the current folder is {Path.cwd()}."
            )


def carry_out(name: str, work: Callable[[], object]) -> int:
    """Runs a command so that an error becomes one message, and a reader that has gone away is no error.

    Args:
        name: Name of the command, for messages.
        work: Function to call. A number that it returns is the exit status.

    Returns:
        Exit status: that of the work; 1 for an error of Theia's own or of the system, 130 after Ctrl-C, 141 if nobody
        reads the output any more, as after ``| head -1``.
    """
    try:
        status = _attempt(name, work)
    except SystemExit:  # after --help, or an option that does not parse
        _end_output(name)
        raise
    return _end_output(name) or status


def _attempt(name: str, work: Callable[[], object]) -> int:
    try:
        status = work()
        return status if isinstance(status, int) else 0
    except TheiaError as error:
        return _fail(f"{name}: {error}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C would only interrupt the cleaning up
        return _fail(f"{name}: interrupted. To go on, run the same command again.", 130)
    except OSError as error:
        return _refused(name, error)


def _end_output(name: str) -> int:
    """Flushes the output while an error can still be reported; the interpreter would do so at its end, noisily."""
    if sys.stdout is None:  # closed by the program that started this one
        return 0
    try:
        sys.stdout.flush()
    except OSError as error:
        status = _refused(name, error)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes the rest of the output
        return status
    return 0


def _refused(name: str, error: OSError) -> int:
    if any(_nobody_reads(stream) for stream in (sys.stdout, sys.stderr)):
        return 128 + signal.SIGPIPE  # what a shell reports of a program that the signal ended
    return _fail(f"{name}: {what_was_refused(error)}")


def _fail(message: str, status: int = 1) -> int:
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)
    return status


def _nobody_reads(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody will ever read from again."""
    if stream is None:
        return False
    try:
        descriptor = stream.fileno()
    except OSError:  # not a file of the system, as in a notebook
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="theia",
        description="Distil many vision foundation models into one small visual encoder for robots.",
        epilog="'theia COMMAND --help' lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"theia {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def _log_to_stderr() -> None:
    # Not the root logger: Lightning and TensorBoard add handlers of their own, and each line would come twice.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("theia")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms" in str(error):
            raise TheiaError(
                "The installed torch and torchvision do not belong together (most often a CPU-only torch beside PyPI's "
                "torchvision). Install both from one index, in a fresh environment: pip install -e ."
            ) from error
        raise
