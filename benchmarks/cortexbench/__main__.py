"""``python -m benchmarks.cortexbench COMMAND``: what an encoder is worth to a robot, in a simulator."""

import sys
from collections.abc import Callable, Sequence

from benchmarks.command import run_command
from benchmarks.cortexbench.collect import collect
from benchmarks.cortexbench.commands import export, report, run
from benchmarks.cortexbench.originals import import_originals

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
    about = "What an encoder is worth to a robot, in a simulator."
    return run_command("benchmarks.cortexbench", about, _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
