"""Files that somebody needs later: a full disk keeps the old ones whole; and nobody writes them past the one way."""

import ast
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import report as soak
from benchmarks.soak.watch import Sample
from benchmarks.throughput import report as throughput
from theia.ablation import report
from theia.ablation.record import write_record
from theia.ablation.summary import Scored, summarise
from theia.ablation.sweep_run import Run
from theia.decoding.output import Output
from theia.errors import FileError
from theia.extraction.sources import SampleSource
from theia.live.images import check_images
from theia.probing.comparison import Unfinished
from theia.probing.probes import Probed
from theia.scoring.scorers import write_report

Writer = Callable[[Path, int], object]  # into a folder, the first or the second time


def run_of(folder: Path, number: int) -> Run:
    config = {"data": {"teachers": ["x"], "batch_size": number}, "trainer": {"accumulate_grad_batches": 1}}
    return Run("a", 0, folder / "a", {}, config, 4, (), f"store {number}")


def write_sweep_report(folder: Path, number: int) -> None:
    scored = [Scored(row=row, seed=0, teachers=("x",), scores={"loss": number}, options={}) for row in "ab"]
    report.write_report(folder, summarise(scored), {})


def write_picture(folder: Path, number: int) -> None:
    Output(folder, {"a": "b/a.png"}).save("a", np.full((4, 4, 3), number, np.uint8))


def write_soak(folder: Path, number: int) -> None:
    samples = [Sample(60 * minute, 100.0, 0, 0, 30, 5, 3, 0) for minute in range(12)]
    soak.write(folder / "soak.json", samples, {}, {"number": number})


WRITERS: dict[str, Writer] = {
    "figures of a test": lambda folder, number: write_report(folder / "test_last.json", {"loss": number}),
    "config of a run": lambda folder, number: run_of(folder, number).prepare(),
    "record of a sweep": lambda folder, number: write_record(folder, [], [], {}, {"number": number}),
    "report of a sweep": write_sweep_report,
    "record of pictures": lambda folder, number: Output(folder, {}).finish({"number": number}, []),
    "picture": write_picture,
    "benchmark": lambda folder, number: throughput.write(folder, f"cpu{number}", {}, {}),
    "soak": write_soak,
    "checked images": lambda folder, number: check_images(SampleSource("val", number), "", folder / "checked.json", 0),
    "unfinished probes": lambda folder, number: Unfinished(folder).keep("id", Probed({"x": [number]}, {})),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_keeps_the_old_file_and_is_named(
    writer: Writer, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer(tmp_path, 1)
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(FileError, match=rf"Disk full while writing {tmp_path}.* \(file system /"):
            writer(tmp_path, 2)

    assert contents(tmp_path) == before
    writer(tmp_path, 2)
    assert contents(tmp_path) != before


# Rooms whose files go through theia.utils.files, and what they write otherwise, with the reason.
ROOMS = (
    "theia/cli",
    "theia/training",
    "theia/analysis",
    "theia/ablation",
    "theia/decoding",
    "theia/policies",
    "benchmarks",
)
OTHERWISE = {
    "theia/ablation/launch.py": {
        "self.run.log.open('ab')": "what a run says, line by line",
        "job.run.log.open('a')": "likewise",
    },
    "theia/ablation/report.py": {"savefig(picture": "into memory"},
    "benchmarks/cortexbench/reporting.py": {"print_png(str(temporary))": "inside replacing()"},
    "benchmarks/cortexbench/rollouts.py": {"load_av().open(str(temporary)": "inside replacing()"},
    "benchmarks/throughput/live.py": {"save(folder": "data that the benchmark deletes"},
    "theia/analysis/page.py": {"savefig(content": "into memory"},
    "theia/decoding/output.py": {"save(temporary": "inside replacing()"},
    "theia/decoding/frames.py": {"save(temporary": "inside replacing()", "av.open": "likewise"},
    "theia/cli/run_folder.py": {"self.parser.dump": "into memory"},
    "theia/training/checkpoints.py": {"temporary.open('wb')": "inside replacing()", "torch.save": "into that file",
        "records.save()": "what Lightning calls to bring out what waits",
    },
    "theia/training/records.py": {
        "self.path.open('ab')": "a row at once; a torn one is not read", "temporary.open('wb')": "inside replacing()",
    },
    "theia/cli/ablate.py": {"parser.dump": "into memory"},
    "theia/cli/data.py": {"super().dump": "into memory"},
    "theia/training/callbacks.py": {"savefig(temporary": "inside replacing()"},
    "theia/policies/cloning.py": {"torch.save(state, buffer)": "into memory"},
    "theia/policies/policy.py": {"part /": "inside writing()", "save(tensors": "into memory"},
    "theia/probing/display.py": {"print_png(str(temporary))": "inside replacing()"},
    "theia/probing/comparison.py": {
        "temporary.open('wb')": "inside replacing()", "np.savez(file": "into that file",
    },
    "benchmarks/soak/__main__.py": {"(Path(data) / 'output').open('w+')": "deleted with the data"},
    "benchmarks/soak/report.py": {"savefig(picture": "inside replacing()"},
    "benchmarks/throughput/extraction.py": {
        "site / 'theia_bench_free.py'": "deleted with the data", "info / 'METADATA'": "likewise",
        "info / 'entry_points.txt'": "likewise", "raw / str(number)": "likewise",
    },
    "benchmarks/throughput/opponents/tars.py": {"safetensors.torch.save": "into memory"},
}  # fmt: skip
WRITING = {"write_text", "write_bytes", "touch", "savefig", "print_png", "save", "savez", "dump"}


def writes(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            modes = [
                one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
            if name in WRITING or (name == "open" and any(mode and set(mode) <= set("wax+bt") for mode in modes)):
                yield ast.unparse(node)


def test_nobody_writes_a_file_past_the_one_way() -> None:
    found = {str(path): list(writes(path)) for room in ROOMS for path in Path(room).rglob("*.py")}
    assert len(found) > 80
    for path, calls in found.items():
        known = OTHERWISE.get(path, {})
        assert not [call for call in calls if not any(one in call for one in known)], path
