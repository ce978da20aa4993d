import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from small_store import CLS, ODD, begin, extract

from theia.errors import StoreError
from theia.store.manifest import edit_manifest, read_manifest, write_manifest


def content(root: Path) -> Any:
    return json.loads((root / "manifest.json").read_text())


def test_says_what_is_on_disk(tmp_path: Path) -> None:
    extract(tmp_path)
    manifest = content(tmp_path)
    assert manifest["schema"] == 1
    split = manifest["splits"]["train"]
    assert split["images"]["listed"] == 10
    assert split["sets"]["odd"]["spec"]["grid_hw"] == [10, 10]
    assert split["sets"]["odd"]["computed"] == {"device": "cpu"}
    for name, record in split["sets"].items():
        assert record["complete"]
        assert [shard["rows"] for shard in record["shards"]] == [4, 3, 2]
        for shard in record["shards"]:
            path = tmp_path / "train" / name / f"shard-{shard['index']:06d}.h5"
            assert shard["bytes"] == path.stat().st_size
            assert shard["sha256"] == sha256(path.read_bytes()).hexdigest()


def test_reads_back_what_it_wrote(tmp_path: Path) -> None:
    extract(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.splits["train"].teachers == {"odd": ODD, "with_cls": CLS}
    before = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").unlink()
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_folder_that_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a feature store: it has no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("schema", "message"), [(2, "schema 2.*pip install --upgrade"), (0, "schema 0.*Extract again"), (None, "no schema")]
)
def test_other_schemas_are_refused(tmp_path: Path, schema: int | None, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": schema, "splits": {}}))
    with pytest.raises(StoreError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", '{"schema": 1', "[]", '{"schema": 1}', '{"schema": 1, "splits": {"train": {}}}'])
def test_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_complete_set_must_have_all_its_shards(tmp_path: Path) -> None:
    extract(tmp_path)
    manifest = content(tmp_path)
    del manifest["splits"]["train"]["sets"]["odd"]["shards"][1]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="'odd' is complete, but not all its shards"):
        read_manifest(tmp_path)


def test_jobs_on_one_store_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, split="train")
    (held, tell_held), (wanted, tell_wanted) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(tell_wanted)
        with edit_manifest(tmp_path):
            os.write(tell_held, b".")
            os.read(wanted, 1)  # until the parent wants its turn, or has ended without
        os._exit(0)
    os.close(tell_held)
    os.read(held, 1)
    refused = []

    class Watched(FileLock):
        def acquire(self, *arguments: Any, **options: Any) -> Any:
            try:
                super().acquire(timeout=0)
            except Timeout as error:
                refused.append(error)
            os.write(tell_wanted, b".")
            return super().acquire(*arguments, **options)

    monkeypatch.setattr("theia.store.disk.FileLock", Watched)
    begin(tmp_path, split="val")
    os.close(tell_wanted)
    os.waitpid(child, 0)
    assert len(refused) == 1
    assert list(read_manifest(tmp_path).splits) == ["train", "val"]
