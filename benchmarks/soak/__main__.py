"""``python -m benchmarks.soak``: trains for a while with reading workers and watches what the processes hold."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.command import check_folders
from benchmarks.soak.report import grown, summarize, table, write
from benchmarks.soak.store import write_store
from benchmarks.soak.watch import Watch
from benchmarks.throughput.measure import BenchmarkError
from theia.cli.main import carry_out
from theia.cli.parser import Parser
from theia.utils.arguments import MOST_PROCESSES, check_number
from theia.utils.provenance import machine, versions

# Enough points for a line, and too few to disturb the training.
_LOOKS = 400
# In minutes; a shorter run is still warming up.
_JUDGED_FROM = 10
_MOST_MINUTES = 100 * 24 * 60
# A training ends with a validation.
_PATIENCE_S = 1800


class SoakError(BenchmarkError):
    """The training did not run as it should."""


def soak(
    minutes: float = 30,
    workers: int = 2,
    folder: Path | None = None,
    results: Path = Path("benchmarks/results"),
    small: bool = False,
) -> Path:
    """Trains a small student on rows of full size and watches memory, descriptors and processes.

    Args:
        minutes: Length of the training, in minutes.
        workers: Number of reading processes.
        folder: Folder for the data (0.6 GB), which are deleted afterwards; by default the system's temporary folder.
        results: Folder for the JSON and the picture.
        small: Whether to use tiny rows, for a test of the benchmark itself.

    Returns:
        Path of the JSON.

    Raises:
        ConfigError: If a number is out of its range, or nothing can be written into a folder.
        SoakError: If the training fails, is too short to judge, holds more and more, or leaves something behind.
    """
    check_number("minutes", minutes, 0.01, _MOST_MINUTES)
    check_number("workers", workers, 0, MOST_PROCESSES)
    check_folders(results, folder)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=folder) as data:
        store = Path(data) / "store"
        write_store(store, **({"train": 64, "val": 32, "grid": 2, "image_size": 32} if small else {}))
        training = _command(store, Path(data) / "run", minutes, workers)
        with (Path(data) / "output").open("w+") as output:
            process = subprocess.Popen(training, stdout=output, stderr=subprocess.STDOUT)
            try:
                _wait_for(Path(data) / "run" / "config.yaml", process)
                watch = _watch(process, minutes)
            finally:
                process.kill()  # of no effect on one that has ended
                process.wait()
            output.seek(0)
            said = output.read()
        if process.returncode:
            raise SoakError(f"The training ended with status {process.returncode}. It said:\n{said[-2000:]}")
    left = watch.left_behind()
    samples = watch.samples
    if len(samples) < 4:
        raise SoakError(f"The training ended after {len(samples)} looks at it. Give it more minutes.")
    summary = summarize(samples)
    path = results / f"soak-{time.strftime('%Y%m%d-%H%M%S')}.json"
    settings = {"minutes": minutes, "workers": workers, "small": small}
    more = {"versions": versions(), "machine": machine(), "settings": settings, "left_behind": left}
    write(path, samples, summary, more)
    print(table(summary))
    print(f"left behind at the end: {left['processes']} processes, {left['shared_memory']} files in /dev/shm")
    print(f"{path}, {path.with_suffix('.png').name}")
    problems = grown(summary) if minutes >= _JUDGED_FROM else []
    problems += [f"left behind: {count} {name}" for name, count in left.items() if count]
    if problems:
        raise SoakError(f"The training holds too much: {'; '.join(problems)}.")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    parser = Parser(prog="python -m benchmarks.soak", description="Trains for a while and watches what is held.")
    parser.add_function_arguments(soak)
    return carry_out("benchmarks.soak", lambda: soak(**parser.parse_args(argv).as_dict()))


def _command(store: Path, run: Path, minutes: float, workers: int) -> list[str]:
    seconds = round(minutes * 60)
    return [
        sys.executable, "-m", "theia", "fit",
        f"--data.store={store}", f"--run_folder={run}", f"--data.workers={workers}",
        "--data.batch_size=16", "--data.val_batch_size=16",
        "--model.width=32", "--model.depth=2", "--model.heads=2",
        "--trainer.accelerator=cpu", "--trainer.max_epochs=1000000", "--trainer.check_val_every_n_epoch=5",
        f"--trainer.max_time={seconds // 86400:02}:{time.strftime('%H:%M:%S', time.gmtime(seconds % 86400))}",
        "--trainer.enable_progress_bar=false", "--checkpoint_every=50",
    ]  # fmt: skip


def _wait_for(file: Path, process: "subprocess.Popen[bytes]") -> None:
    """Waits until a training has begun: loading the libraries is no part of the watched time."""
    while process.poll() is None and not file.exists():
        time.sleep(0.1)


def _watch(process: "subprocess.Popen[bytes]", minutes: float) -> Watch:
    """Watches a training for its allotted time, and waits for its end."""
    watch = Watch(process.pid)
    length = minutes * 60
    end = time.perf_counter() + length
    with tqdm(total=round(length), unit="s", desc="soak") as bar:
        for sample in watch.follow(
            lambda: process.poll() is None and time.perf_counter() < end, max(0.5, length / _LOOKS)
        ):
            bar.update(round(sample.seconds) - bar.n)
            bar.set_postfix_str(f"{sample.pss_mb:.0f} MB")
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise SoakError(f"The training did not end within {_PATIENCE_S} s of its time.") from error
    return watch


if __name__ == "__main__":
    sys.exit(main())
