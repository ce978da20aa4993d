"""``theia COMMAND ...``: finds the command's module and loads nothing else."""

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from theia.errors import TheiaError
from theia.version import __version__

_LIGHTNING = "theia.cli.lightning"

# Command -> (module with main(argv), one line of help).
COMMANDS = {
    "extract": ("theia.cli.extract", "run teachers over images once and store their features"),
    "store": ("theia.cli.store", "say what is in a feature store, or verify every checksum of it"),
    "teachers": ("theia.cli.teachers", "list the installed teachers"),
    "fit": (_LIGHTNING, "train a student on a feature store, or resume its training"),
    "validate": (_LIGHTNING, "score a checkpoint on held-out images, in Lightning's table"),
    "test": (_LIGHTNING, "score a checkpoint against the untrained student, with a table and a picture"),
    "ablate": ("theia.cli.ablate", "train, score and compare students: which teachers, which loss, which size"),
    "analyze": ("theia.cli.analyze", "compare representations: norms, components, similarity, CKA; of any encoders"),
    "decode": ("theia.cli.decode", "show what a student has learned: masks, depth, strokes, colours; images or video"),
    "export": ("theia.cli.export", "write a trained model for others: safetensors, ONNX, timm, the published layout"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for an error of Theia's own (one message on stderr), 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = _parser().parse_args(arguments[:1]).command
    _log_to_stderr()
    name = COMMANDS[command][0]
    try:
        module = _import(name)
        # LightningCLI's commands share one parser, so it is given the command too.
        return int(module.main(arguments if name == _LIGHTNING else arguments[1:]) or 0)
    except TheiaError as error:
        print(f"theia {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience would only interrupt the cleaning up
        print(f"theia {command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="theia",
        description="Distil many vision foundation models into one small visual encoder for robots.",
        epilog="'theia COMMAND --help' lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"theia {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (_, line) in COMMANDS.items():
        commands.add_parser(command, help=line, add_help=False)
    return parser


def _log_to_stderr() -> None:
    # Not to the root logger: Lightning and TensorBoard bring handlers of their own, and each line would come twice.
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
