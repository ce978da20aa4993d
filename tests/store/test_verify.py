import errno
import os
from pathlib import Path
from typing import Any

import h5py
import pytest
from small_store import CLS, ODD, begin, extract, image_set, write_features, write_images

from theia.errors import StoreError
from theia.store.statistics import ChannelStatistics
from theia.store.verify import Checked, Problem, describe, verify


@pytest.fixture
def root(tmp_path: Path) -> Path:
    extract(tmp_path / "store")
    return tmp_path / "store"


def problems(root: Path) -> list[tuple[str, str]]:
    return [(str(event.path.relative_to(root)), event.text) for event in verify(root) if isinstance(event, Problem)]


def flip(path: Path, dataset: str, row: int) -> None:
    """Flips one bit of one row, as a disk does: behind everyone's back."""
    with h5py.File(path) as file:
        offset = file[dataset].id.get_offset()
        size = file[dataset][:1].nbytes
    with path.open("r+b") as file:
        file.seek(offset + row * size + size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_whole_store_has_no_problem_and_every_byte_is_read(root: Path) -> None:
    events = list(verify(root))
    assert all(isinstance(event, Checked) for event in events)
    assert {event.path for event in events} == set(root.rglob("*.h5"))
    assert sum(event.bytes for event in events if isinstance(event, Checked)) == sum(
        path.stat().st_size for path in root.rglob("*.h5")
    )


@pytest.mark.parametrize(
    ("name", "dataset"), [("image", "data"), ("image", "label"), ("odd", "data"), ("with_cls", "cls")]
)
def test_flipped_bit_is_found_and_the_sample_named(root: Path, name: str, dataset: str) -> None:
    flip(root / f"train/{name}/shard-000001.h5", dataset, 2)
    ((path, text),) = problems(root)
    assert path == f"train/{name}/shard-000001.h5"
    assert text.startswith("has damaged samples: 'café/7.jpg' (row 2). Delete it")


def test_flipped_bit_in_a_scale_is_found(tmp_path: Path) -> None:
    extract(tmp_path, dtype="int8")
    flip(tmp_path / "train/odd/shard-000000.h5", "scale", 3)
    assert "'café/3.jpg' (row 3)" in problems(tmp_path)[0][1]


def test_flipped_bit_outside_the_samples_is_found(root: Path) -> None:
    flip(root / "train/odd/shard-000000.h5", "sum", 5)
    ((_, text),) = problems(root)
    assert "in its structure, ids or sums; the samples are whole" in text


def test_extracting_again_mends_a_deleted_damaged_shard(root: Path) -> None:
    flip(root / "train/odd/shard-000001.h5", "data", 2)
    (root / "train/odd/shard-000001.h5").unlink()
    extract(root)
    assert not problems(root)


def test_truncated_missing_and_garbage_files_are_found(root: Path) -> None:
    cut, gone, garbage = (root / f"train/odd/shard-00000{index}.h5" for index in range(3))
    size = cut.stat().st_size
    os.truncate(cut, 999)
    gone.unlink()
    garbage.write_bytes(bytes(garbage.stat().st_size))
    texts = dict(problems(root))
    assert f"999 bytes, the manifest says {size}" in texts["train/odd/shard-000000.h5"]
    assert "is missing" in texts["train/odd/shard-000001.h5"]
    assert "is damaged" in texts["train/odd/shard-000002.h5"]


def test_wrong_statistics_are_found(root: Path) -> None:
    path = root / "statistics/odd.npz"
    statistics = ChannelStatistics.load(path)
    ChannelStatistics(statistics.mean + 1, statistics.std, statistics.count).save(path)
    assert problems(root) == [
        ("statistics/odd.npz", "differs from the sums in the shards. Delete it and run its theia extract again.")
    ]
    path.unlink()
    assert "is missing" in problems(root)[0][1]
    extract(root)
    assert not problems(root)


def test_unfinished_set_is_a_problem(tmp_path: Path) -> None:
    writer = begin(tmp_path, teachers=[ODD])
    write_images(writer, image_set(), 0)
    assert problems(tmp_path) == [
        ("train/image", "is unfinished: 1 of 3 shards. Run its theia extract again."),
        ("train/odd", "is unfinished: 0 of 3 shards. Run its theia extract again."),
    ]


def test_shards_of_an_unfinished_set_are_checked(tmp_path: Path) -> None:
    writer = begin(tmp_path, teachers=[ODD])
    for index in range(2):
        write_images(writer, image_set(), index)
    flip(tmp_path / "train/image/shard-000001.h5", "data", 2)
    (unfinished, damaged, odd) = problems(tmp_path)
    assert "unfinished: 2 of 3" in unfinished[1]
    assert damaged[0] == "train/image/shard-000001.h5"
    assert damaged[1].startswith("has damaged samples: 'café/7.jpg' (row 2)")
    assert "unfinished: 0 of 3" in odd[1]


def test_file_that_the_system_refuses_is_a_problem_among_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = root / "train/odd/shard-000001.h5", Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    events = list(verify(root))
    (problem,) = [event for event in events if isinstance(event, Problem)]
    assert problem.path == path
    assert problem.text.startswith("cannot be read: [Errno 5]")
    assert len(events) == 10


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No feature store"):
        list(verify(tmp_path / "nowhere"))


def test_describe_counts_what_is_on_disk(root: Path) -> None:
    extract(root, split="val", listed=6, dtype="int8", teachers=[CLS])
    train, val = describe(root)
    assert (train.name, train.images, train.skipped) == ("train", image_set(), 1)
    assert [part.name for part in train.sets] == ["image", "odd", "with_cls"]
    assert {(part.rows, part.shards, part.complete) for part in train.sets} == {(9, 3, True)}
    for part in train.sets:
        assert part.bytes == sum(path.stat().st_size for path in (root / "train" / part.name).glob("*.h5"))
    assert (val.sets[1].spec, val.sets[1].dtype) == (CLS, "int8")


def test_describe_counts_what_an_unfinished_extraction_has(tmp_path: Path) -> None:
    writer = begin(tmp_path, teachers=[ODD])
    for index in range(2):
        write_images(writer, image_set(), index)
    write_features(writer, ODD, 0)
    (train,) = describe(tmp_path)
    assert train.skipped is None
    assert [(part.rows, part.shards, part.complete) for part in train.sets] == [(7, 2, False), (4, 1, False)]
    for part in train.sets:
        assert part.bytes == sum(path.stat().st_size for path in (tmp_path / "train" / part.name).glob("*.h5"))
