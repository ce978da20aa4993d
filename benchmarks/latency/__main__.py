"""``python -m benchmarks.latency``: measures, prints one table, writes one JSON."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import check_folders
from benchmarks.latency import control, cuda, runtimes
from benchmarks.latency.report import results as records
from benchmarks.latency.report import table
from benchmarks.latency.rows import Row, measure
from benchmarks.latency.trained import random_encoder, trained_encoder
from benchmarks.throughput.measure import MOST_PAIRS, BenchmarkError
from benchmarks.throughput.report import write
from theia.cli.main import carry_out
from theia.cli.parser import Parser
from theia.encoder.encoder import Encoder
from theia.encoder.load import load
from theia.export.onnx import photographs
from theia.models.backbone import THEIA_SHAPES, TIMM
from theia.utils.arguments import MOST_PROCESSES, check_number, comma_list
from theia.utils.provenance import machine, versions

_PIXELS = 224
_MOST_IMAGES = 65536  # in a batch: ten gigabytes


def bench(
    encoder: str | None = None,
    backbones: str | None = None,
    policy: Path | None = None,
    batches: str = "1,32",
    pairs: int = 5,
    threads: int = 1,
    results: Path = Path("benchmarks/results"),
) -> Path:
    """Measures how long an encoder takes, in PyTorch and in other runtimes, and on a GPU if there is one.

    With --policy, it measures how many actions a policy gives in a second on the CPU instead.

    Args:
        encoder: Model of your own to measure instead, in any form that theia.load takes.
        backbones: Backbones, as in 'theia fit', separated by commas; theia_tiny, theia_small and theia_base by default.
            theia_tiny gets a training of about a minute first; the others have random weights.
        policy: Folder of a policy, as for theia.load_policy.
        batches: Batch sizes, separated by commas.
        pairs: Number of counted turns of every runtime.
        threads: Number of threads of every runtime.
        results: Folder for the JSON with all repetitions.

    Returns:
        Path of the JSON.

    Raises:
        ConfigError: If a number is out of its range, or nothing can be written into the folder.
        BenchmarkError: If there is no such backbone or batch, or a runtime gives other results than the others.
        TheiaError: If the encoder cannot be loaded.
    """
    if sum(given is not None for given in (encoder, backbones, policy)) > 1:
        raise BenchmarkError(
            "--backbones names models to build here, --encoder a model of your own, --policy a policy. Give one of "
            "them."
        )
    chosen = [] if encoder is not None else [*THEIA_SHAPES] if backbones is None else comma_list(backbones)
    counts = comma_list(batches)
    check_number("pairs", pairs, 1, MOST_PAIRS)
    check_number("threads", threads, 1, MOST_PROCESSES)
    _check(chosen, counts)
    check_folders(results)
    if policy is not None:
        return _control(policy, pairs, threads, results)
    settings = {
        "backbones": chosen, "batches": counts, "pairs": pairs, "threads": threads, "own_encoder": bool(encoder)
    }  # fmt: skip
    record: dict[str, Any] = {"versions": versions(), "machine": machine(), "settings": settings, "training": {}}
    rows: list[Row] = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, weights, model in _models(encoder, chosen, record["training"]):
            with tempfile.TemporaryDirectory(prefix="theia-bench-") as folder:
                for count in counts:
                    _say(f"{name}, batch {count} ...")
                    case = runtimes.Case(model, int(count), threads, Path(folder))
                    rows += _on_all_devices(case, pairs, name, weights)
    finally:
        torch.set_num_threads(threads_before)
        # If a later model fails, what was measured is kept.
        if rows:
            print(table(rows))
            path = write(results, "latency", records(rows), record)
            print(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    parser = Parser(prog="python -m benchmarks.latency", description="Measures how long an encoder takes here.")
    parser.add_function_arguments(bench)
    return carry_out("benchmarks.latency", lambda: bench(**parser.parse_args(argv).as_dict()))


def _control(policy: Path, turns: int, threads: int, results: Path) -> Path:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = control.measure(policy, turns)
    finally:
        torch.set_num_threads(threads_before)
    print(control.table(found))
    record = {"versions": versions(), "machine": machine(), "settings": {"pairs": turns, "threads": threads}}
    path = write(results, "control", {"policy": found}, record)
    print(path)
    return path


def _models(own: str | None, backbones: list[str], training: dict[str, Any]) -> Iterator[tuple[str, str, Encoder]]:
    """Name, origin of the weights, and encoder of each model; the losses of a training go into ``training``."""
    if own is not None:
        # Only its last part: nobody else needs to know the folders around it.
        yield Path(own).name, "given", load(own)
        return
    for name in backbones:
        if name == "theia_tiny":
            _say("training theia_tiny, about a minute ...")
            encoder, training["losses"] = trained_encoder(name)
            yield name, "trained", encoder
        else:
            yield name, "random", random_encoder(name)


def _on_all_devices(case: runtimes.Case, pairs: int, model: str, weights: str) -> list[Row]:
    images = photographs(_PIXELS, _PIXELS)
    rows = measure(case, runtimes.RUNTIMES, images, pairs, model=model, weights=weights)
    if torch.cuda.is_available():
        rows += measure(case, cuda.RUNTIMES, images, pairs, model=model, weights=weights, device="cuda")
    return rows


def _check(backbones: list[str], batches: list[str]) -> None:
    unknown = [name for name in backbones if name not in THEIA_SHAPES and not name.startswith(TIMM)]
    if unknown:
        raise BenchmarkError(
            f"There is no backbone {', '.join(unknown)!r}. Choose from: {', '.join(THEIA_SHAPES)}, timm:NAME."
        )
    if not batches or not all(count.isdecimal() and 0 < int(count) <= _MOST_IMAGES for count in batches):
        raise BenchmarkError(
            f"--batches is {','.join(batches)!r}; give whole numbers above 0 and up to {_MOST_IMAGES}, such as 1,32."
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
