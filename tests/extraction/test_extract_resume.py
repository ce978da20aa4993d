import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from extraction.tiny_plugin import SIZE, install, write_images

# One import, then a process for every attempt: fork is safe as long as nothing has computed yet.
KILLED_AND_NOT = """
import os, random, signal, sys, time, traceback
from pathlib import Path
from theia.extraction.config import ExtractConfig
from theia.extraction.extract import extract

root = Path(sys.argv[1])

def start(store):
    pid = os.fork()
    if pid:
        return pid
    try:
        extract(ExtractConfig(
            images={"train": str(root / "images"), "val": str(root / "held_out")}, teachers="pooled,mean",
            store=root / store, size=int(sys.argv[2]), shard_size=4, batch_size=2, workers=0, accelerator="cpu",
            devices=1, teacher_options={"pooled": {"delay": 0.03, "log": str(root / f"{store}.log")}},
        ))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

begun = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
duration = time.monotonic() - begun
random.seed(0)
kills = 0
for attempt in range(8):
    pid = start("killed")
    time.sleep(random.uniform(0.05, 0.5) * duration)
    os.kill(pid, signal.SIGKILL)  # does nothing to one that has ended and was not waited for
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    kills += status == signal.SIGKILL
assert os.waitpid(start("killed"), 0)[1] == 0
print(kills)
"""

COMMAND = """
import sys
from theia.cli.main import main

sys.exit(main(["extract", *sys.argv[1:]]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of subprocesses that find the tiny plugin; images are there too."""
    install(tmp_path / "site")
    write_images(tmp_path / "images", 30)
    write_images(tmp_path / "held_out", 6)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}


def assert_same_store(actual: Path, expected: Path) -> None:
    """Compares every array of every file, with h5py and numpy alone."""
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (actual, expected)]
    assert names[0] == names[1]
    for name in names[1]:
        if name.endswith(".h5"):
            with h5py.File(actual / name) as one, h5py.File(expected / name) as other:
                assert dict(one.attrs) == dict(other.attrs)
                assert set(one) == set(other)
                for dataset in other:
                    np.testing.assert_array_equal(one[dataset][()], other[dataset][()])
        if name.endswith(".npz"):
            with np.load(actual / name) as one, np.load(expected / name) as other:
                for array in other:
                    np.testing.assert_array_equal(one[array], other[array])
        if name.endswith(".csv"):
            assert (actual / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_ends_with_the_same_store(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-c", KILLED_AND_NOT, str(tmp_path), str(SIZE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    assert_same_store(tmp_path / "killed", tmp_path / "whole")
    # Nine processes did not do the work nine times.
    batches = {name: len((tmp_path / f"{name}.log").read_text().splitlines()) for name in ("killed", "whole")}
    assert batches["killed"] < 3 * batches["whole"]


@pytest.fixture
def command(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``theia extract`` as a user runs it."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)

    def run(store: str, devices: int, *more: str) -> subprocess.CompletedProcess[str]:
        options = {
            "images": tmp_path / "images",
            "teachers": "pooled,mean",
            "store": tmp_path / store,
            "size": SIZE,
            "shard_size": 4,
            "batch_size": 3,
            "workers": 0,
            "accelerator": "cpu",
            "devices": devices,
            "pooled.log": tmp_path / f"{store}.log",
        }
        arguments = [sys.executable, str(script), *(f"--{key}={value}" for key, value in options.items()), *more]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.mark.slow
def test_two_processes_write_the_store_of_one(tmp_path: Path, command) -> None:
    for name, devices in {"one": 1, "two": 2}.items():
        done = command(name, devices)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Next: theia fit") == 1
        log = (tmp_path / f"{name}.log").read_text()
        assert len({line.split()[0] for line in log.splitlines()}) == devices
    assert_same_store(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("failing", [4, 0], ids=["second process", "first process"])
def test_a_process_that_fails_ends_all_with_one_message(tmp_path: Path, command, failing: int) -> None:
    (tmp_path / "images" / f"{failing:03d}.png").write_bytes(b"no image")
    done = command("store", 2, "--max_skipped=0")
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("1 of the 30 images of split 'train' cannot be read") == 1
    assert "Next: theia fit" not in done.stdout
    (tmp_path / "images" / f"{failing:03d}.png").unlink()
    write_images(tmp_path / "images", 30)
    assert command("store", 2).returncode == 0
