import signal
from collections.abc import Callable
from pathlib import Path

import forked
import h5py
import numpy as np
import pytest
from extraction.tiny_plugin import SIZE, install, write_images

Extract = Callable[..., forked.Started]


@pytest.fixture
def command(tmp_path: Path) -> Extract:
    """Starts ``theia extract`` as a user does who has installed the tiny plugin; images are there too."""
    install(tmp_path / "site")
    write_images(tmp_path / "images", 30)
    write_images(tmp_path / "held_out", 6)

    def start(store: str, devices: int, *more: str, prepare: tuple[str | int, ...] = ()) -> forked.Started:
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
        arguments = [f"--{key}={value}" for key, value in options.items()]
        return forked.theia("extract", *arguments, *more, path=tmp_path / "site", prepare=prepare)

    return start


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
def test_killed_again_and_again_and_run_again_ends_with_the_same_store(tmp_path: Path, command: Extract) -> None:
    splits = f"--images={{train: {tmp_path / 'images'}, val: {tmp_path / 'held_out'}}}"
    assert command("whole", 1, splits).wait() == 0
    kills = 0

    def start() -> forked.Started:
        # At a call that changes a disk, each time another, in whichever of its threads.
        return command("killed", 1, splits, prepare=("store.small_store", "kill_at", 60 + 19 * kills))

    while (killed := start()).wait():
        assert killed.returncode == -signal.SIGKILL, killed.err
        kills += 1
    assert kills >= 3
    assert_same_store(tmp_path / "killed", tmp_path / "whole")
    # Each kill cost at most the two batches of a shard, and one that was computed ahead.
    batches = {name: len((tmp_path / f"{name}.log").read_text().splitlines()) for name in ("killed", "whole")}
    assert batches["killed"] <= batches["whole"] + 3 * kills


@pytest.mark.slow
def test_two_processes_write_the_store_of_one(tmp_path: Path, command: Extract) -> None:
    for name, devices in {"one": 1, "two": 2}.items():
        done = command(name, devices)
        assert done.wait() == 0, done.err
        assert done.out.count("Next: theia fit") == 1
        log = (tmp_path / f"{name}.log").read_text()
        assert len({line.split()[0] for line in log.splitlines()}) == devices
    assert_same_store(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_views_are_the_same_from_any_number_of_processes_and_after_a_kill(tmp_path: Path, command: Extract) -> None:
    assert command("whole", 1, "--views=3").wait() == 0
    killed = command("killed", 1, "--views=3", "--workers=1", prepare=("store.small_store", "kill_at", 200))
    assert killed.wait() == -signal.SIGKILL
    there = list((tmp_path / "killed/train/image").glob("shard-*.h5"))
    assert 0 < len(there) < 23  # of 90 samples
    assert command("killed", 2, "--views=3").wait() == 0
    assert_same_store(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("failing", [4, 0], ids=["second process", "first process"])
def test_a_process_that_fails_ends_all_with_one_message(tmp_path: Path, command: Extract, failing: int) -> None:
    (tmp_path / "images" / f"{failing:03d}.png").write_bytes(b"no image")
    done = command("store", 2, "--max_skipped=0")
    assert done.wait() != 0
    assert (done.out + done.err).count("1 of the 30 images of split 'train' cannot be read") == 1
    assert "Next: theia fit" not in done.out
    (tmp_path / "images" / f"{failing:03d}.png").unlink()
    write_images(tmp_path / "images", 30)
    assert command("store", 2).wait() == 0
