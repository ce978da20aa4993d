from pathlib import Path

import numpy as np
import psutil
import pytest
from events import has_ended, wait_for
from litdata.processing import data_processor

from benchmarks.throughput import loaders
from benchmarks.throughput.contenders import ended
from benchmarks.throughput.data import ROW, Samples, check_parity, check_space, random_samples, write_store
from benchmarks.throughput.measure import BenchmarkError, ParityError, Result, Settings
from benchmarks.throughput.opponents import chunks, hdf5, limits, tars
from theia.store.reader import FeatureStore

FORMATS = {"hdf5": hdf5, "tars": tars, "chunks": chunks}


def tiny(count: int = 16) -> Samples:
    return random_samples(count, 8, {"alpha": (2, 3), "beta": (3, 2)}, shard=4)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return loaders.run(Settings(tmp_path_factory.mktemp("loaders"), pairs=2, small=True))


def test_every_aim_is_measured_as_often_as_asked(result: Result) -> None:
    assert [measure.aim for measure in result.measures if measure.aim is not None] == [0.9, 0.65, 0.4, 8, 8, 2]
    assert {len(measure.values) for measure in result.measures} == {2}


def test_every_turn_of_every_path_is_kept(result: Result) -> None:
    costs = result.details["costs_per_epoch"]
    assert list(costs) == [
        "memory copy", "raw preadv", "reader", "loader", "h5py + DataLoader", "webdataset", "litdata",
    ]  # fmt: skip
    assert {len(values) for values in costs.values()} == {2}


def test_the_store_holds_the_samples(tmp_path: Path) -> None:
    samples = tiny()
    write_store(tmp_path / "store", samples)
    split = FeatureStore(tmp_path / "store").open_split("train")
    buffers = split.allocate(len(split))
    split.read_into(np.arange(len(split)), buffers)
    for name, column in samples.columns.items():
        np.testing.assert_array_equal(buffers[name], column)


@pytest.mark.parametrize("name", FORMATS)
def test_another_format_gives_the_samples_shuffled(name: str, tmp_path: Path) -> None:
    samples = tiny(32)
    FORMATS[name].write(tmp_path / name, samples)
    with ended(FORMATS[name].loader(tmp_path / name, 4)) as loader:
        epoch = list(loader)
    check_parity(name, epoch, samples)
    rows = [row for batch in epoch for row in batch[ROW].tolist()]
    assert rows != sorted(rows)


@pytest.mark.parametrize(
    ("path", "module", "function"),
    [
        ("raw preadv", loaders, "write_store"),
        ("h5py . DataLoader", hdf5, "write"),
        ("webdataset", tars, "write"),
        ("litdata", chunks, "write"),
    ],
)
def test_a_path_that_gives_other_bytes_ends_it(
    path: str, module, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(module, function)

    def damaged(folder: Path, samples: Samples) -> None:
        vit = samples.columns["vit"].copy()
        vit[13, 2, 1] += np.float16(0.5)
        real(folder, Samples({**samples.columns, "vit": vit}, samples.shard))

    monkeypatch.setattr(module, function, damaged)
    with pytest.raises(ParityError, match=f"{path} gives other bytes for 'vit' of sample 13"):
        loaders.run(Settings(tmp_path, pairs=1, small=True))


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 3]], ids=["missing", "twice", "one more"])
def test_every_sample_must_come_once(rows: list[int]) -> None:
    samples = tiny(4)
    order = np.array(rows)
    epoch = [limits.as_batch(order, {name: column[order] for name, column in samples.columns.items()})]
    with pytest.raises(ParityError, match="expected 4"):
        check_parity("it", epoch, samples)


@pytest.mark.parametrize("name", FORMATS)
def test_workers_end_with_their_contest(name: str, tmp_path: Path) -> None:
    FORMATS[name].write(tmp_path / name, tiny())
    before = set(psutil.Process().children())
    with ended(FORMATS[name].loader(tmp_path / name, 4)) as loader:
        assert len(list(loader)) == 4
        workers = set(psutil.Process().children()) - before
        assert len(workers) == 2
        held = loader._iterator  # as Lightning's record of attributes may hold it
    wait_for(lambda: all(map(has_ended, workers)))
    assert held is not None


def test_litdata_would_clear_no_folder_but_its_own(tmp_path: Path) -> None:
    chunks.write(tmp_path / "litdata", tiny())
    # By default both are under the system's temporary folder, with names that any program might choose.
    assert Path(data_processor._get_cache_dir()).is_relative_to(tmp_path)
    assert Path(data_processor._get_cache_data_dir()).is_relative_to(tmp_path)


def test_a_full_disk_is_noticed_beforehand(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="--folder DIR"):
        check_space(tmp_path, 1 << 60)
