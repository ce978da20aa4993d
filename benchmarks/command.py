"""How a benchmark ends as a command."""

import sys
from collections.abc import Callable

from benchmarks.throughput.measure import BenchmarkError
from theia.errors import TheiaError


def run(name: str, work: Callable[[], object]) -> int:
    """Does the work of a command; errors that have a message are that message alone.

    Args:
        name: Of the command, for messages.
        work: What to do.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    try:
        work()
    except (BenchmarkError, TheiaError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
