"""``python -m benchmarks.throughput [SUITE ...]``: measures, prints one table, writes one JSON."""

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.command import check_folders
from benchmarks.throughput.measure import MOST_PAIRS, BenchmarkError, Result, Settings
from benchmarks.throughput.report import table, write
from theia.cli.main import carry_out
from theia.cli.parser import Parser
from theia.utils.arguments import MOST_PROCESSES, check_number
from theia.utils.provenance import machine, versions

# Modules of this package, in the order in which they run.
SUITES = [
    name
    for name in ("loaders", "step", "growth", "extraction", "int8", "live", "cold", "gpu")
    if importlib.util.find_spec(f"benchmarks.throughput.{name}")
]
# Suites for the CPU: about five minutes on two cores.
DEFAULT = [name for name in SUITES if name not in ("int8", "live", "cold", "gpu")]


def bench(
    suites: list[str],
    folder: Path | None = None,
    pairs: int = 5,
    threads: int = 2,
    results: Path = Path("benchmarks/results"),
) -> Path:
    """Measures how fast Theia is on this machine, against other ways to do the same.

    Args:
        suites: Names of the suites to run.
        folder: Folder for the data, about 3 GB, which are deleted afterwards; the system's temporary folder by default.
        pairs: Number of counted repetitions of everything that is compared.
        threads: Number of torch's threads in the training process.
        results: Folder for the JSON with all repetitions.

    Returns:
        Path of the JSON.

    Raises:
        ConfigError: If a number is out of its range, or nothing can be written into a folder.
        BenchmarkError: If there is no such suite, or contenders do not do the same work.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise BenchmarkError(f"There is no suite {unknown[0]!r}. Choose from: {', '.join(SUITES)}.")
    check_number("pairs", pairs, 1, MOST_PAIRS)
    check_number("threads", threads, 1, MOST_PROCESSES)
    check_folders(results, folder)
    record = {
        "versions": versions(),
        "machine": machine(),
        "settings": {"suites": suites, "pairs": pairs, "threads": threads},
    }
    finished: dict[str, Result] = {}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in suites:
            print(f"{name} ...", file=sys.stderr, flush=True)
            module = importlib.import_module(f"benchmarks.throughput.{name}")
            with tempfile.TemporaryDirectory(prefix="theia-bench-", dir=folder) as data:
                finished[name] = module.run(Settings(Path(data), pairs))
    finally:
        torch.set_num_threads(threads_before)
        # If a later suite fails, what was measured is kept.
        if finished:
            kind = "gpu" if "gpu" in finished else "cpu"
            print(table(finished))
            path = write(results, kind, finished, record)
            print(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a suite that failed with a message, 130 after Ctrl-C.
    """
    parser = Parser(prog="python -m benchmarks.throughput", description="Measures how fast Theia is here.")
    parser.add_argument("suites", nargs="*", default=DEFAULT, metavar="SUITE", help=f"Any of {', '.join(SUITES)}.")
    parser.add_function_arguments(bench, skip={"suites"})
    return carry_out("benchmarks.throughput", lambda: bench(**parser.parse_args(argv).as_dict()))


if __name__ == "__main__":
    sys.exit(main())
