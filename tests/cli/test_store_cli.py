import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from theia.cli.main import main


def rows(printed: str) -> dict[str, list[str]]:
    """Words of each line, by the first; of two tables the first counts."""
    lines = reversed([line.split() for line in printed.splitlines() if line.strip()])
    return {words[0]: words[1:] for words in lines}


def test_info_lists_every_set_of_every_split(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "info", str(store)]) == 0
    printed = capsys.readouterr().out
    assert "train: 80 images, 32x32 pixels (squash)" in printed
    assert "from test\n" in printed
    assert "val: 20 images" in printed
    table = rows(printed)
    manifest = json.loads((store / "manifest.json").read_text())["splits"]["train"]["sets"]
    assert {"image", "alpha", "beta"} == manifest.keys() <= table.keys()
    for name, shape, cls in (("alpha", ["4x4", "x", "8"], "no"), ("beta", ["3x6", "x", "5"], "yes")):
        shards = str(len(manifest[name]["shards"]))
        assert table[name][:4] == ["80", shards, "of", shards]
        assert table[name][6:11] == [*shape, cls, "float16"]
        assert table[name][-1] == "complete"


def test_info_shows_where_an_extraction_is_unfinished(
    make_split: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_split(tmp_path / "store", "train", 20)
    manifest = tmp_path / "store" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["splits"]["train"]["sets"]["alpha"] |= {"complete": False, "shards": []}
    manifest.write_text(json.dumps(content))
    assert main(["store", "info", str(tmp_path / "store")]) == 0
    table = rows(capsys.readouterr().out)
    assert table["alpha"][-1] == "unfinished"
    assert table["beta"][-1] == "complete"


def test_info_says_where_images_come_from_in_words(
    make_split: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_split(tmp_path / "store", "train", 20)
    manifest = tmp_path / "store" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["splits"]["train"]["images"]["source"] = {"kind": "sample", "crops": 20, "of": ["a", "b"], "labels": False}
    manifest.write_text(json.dumps(content))
    assert main(["store", "info", str(tmp_path / "store")]) == 0
    assert "from sample (crops: 20; of: a, b; labels: no)\n" in capsys.readouterr().out


def test_info_names_files_that_are_gone_or_cut_short(
    make_split: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_split(tmp_path / "store", "train", 20)
    cut, gone = (tmp_path / "store" / "train" / name / "shard-000000.h5" for name in ("alpha", "beta"))
    size = cut.stat().st_size
    os.truncate(cut, size - 1)
    gone.unlink()
    assert main(["store", "info", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    table = rows(printed)
    assert {name: table[name][-1] for name in ("image", "alpha", "beta")} == {
        "image": "complete", "alpha": "damaged", "beta": "damaged",
    }  # fmt: skip
    again = "un its theia extract again."
    assert f"{cut} has {size - 1} bytes, the manifest says {size}. Delete it and r{again}" in printed
    assert f"{gone} is missing. R{again}" in printed


def test_verify_of_a_whole_store_counts_its_shards(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verify", str(store)]) == 0
    count = len(list(store.rglob("*.h5")))
    assert f"{count} shards" in capsys.readouterr().out


def test_verify_names_the_file_and_the_sample_of_a_flipped_bit(
    make_split: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_split(tmp_path / "store", "train", 20)
    path = tmp_path / "store" / "train" / "beta" / "shard-000001.h5"
    with h5py.File(path) as file:
        data, keys = file["data"], file["key"]
        row_bytes = data[0].nbytes
        offset, key = data.id.get_offset() + 2 * row_bytes, keys[2].decode()
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    assert main(["store", "verify", str(tmp_path / "store")]) == 1
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert key in printed
    assert "theia extract" in printed
    assert "problems: 1" in printed


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_missing_store_says_how_to_make_one(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", command, str(tmp_path / "none")]) == 1
    assert "theia extract" in capsys.readouterr().err
