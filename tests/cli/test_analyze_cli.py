import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from theia.cli.main import main

ENCODERS = ["teacher:hog", "teacher:color", "concat:hog,color"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(40, 60), (224, 224), (90, 30), (33, 35), (64, 64), (50, 80)]):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(root / f"{number}.png")
    return root


def analyze(*arguments: str | Path) -> int:
    return main(["analyze", "--device=cpu", *map(str, arguments)])


def read(out: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content: dict[str, Any] = json.loads((out / "analysis.json").read_text(), parse_constant=refuse)
    return content


def test_a_report_of_three_encoders_with_scores(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.csv").write_text('encoder,score\nteacher:hog,1\nteacher:color,2\n"concat:hog,color",4\n')
    out = tmp_path / "out"
    options = ["--images", folder, "--out", out, "--scores", tmp_path / "scores.csv"]
    assert analyze("--encoders", *ENCODERS, *options) == 0

    assert capsys.readouterr().out.rstrip().endswith(str(out / "report.md"))
    content = read(out)
    assert [one["encoder"] for one in content["encoders"]] == ENCODERS
    assert content["images"] == {"analysed": 6, "skipped": []}
    matrix = content["cka"]["matrix"]
    assert [matrix[place][place] for place in range(3)] == pytest.approx([1, 1, 1])
    assert matrix[1][2] > 0.99  # colours are a hundred times longer than gradients
    (found,) = [one for one in content["correlations"] if one["figure"] == "norm entropy"]
    values = [one["norm_entropy"]["value"] for one in content["encoders"]]
    assert found["r"] == pytest.approx(np.corrcoef(values, [1, 2, 4])[0, 1])
    report = (out / "report.md").read_text()
    for name in ("norms", "norm_maps", "pca", "similarity", "cka", "scores"):
        assert f"({name}.png)" in report
        assert Image.open(out / f"{name}.png").width > 300


def test_an_earlier_analysis_is_replaced_on_request_and_other_files_stay(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--encoders", *ENCODERS[:2], "--images", folder, "--out", tmp_path / "out", "--pictures=1"]
    assert analyze(*first) == 0
    assert {"norm_maps.png", "cka.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out/mine.txt").write_text("a note")
    again = ["--encoders", "teacher:hog", "--images", folder, "--out", tmp_path / "out", "--pictures=0"]
    assert analyze(*again) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert analyze(*again, "--overwrite") == 0

    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["analysis.json", "mine.txt", "norms.png", "pca.png", "report.md", "similarity.png"]
    assert len(read(tmp_path / "out")["encoders"]) == 1


def test_unreadable_images_are_skipped_counted_and_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff no image")
    assert analyze("--encoders", "teacher:hog", "--images", tmp_path, "--out", tmp_path / "out") == 0

    images = read(tmp_path / "out")["images"]
    assert images["analysed"] == 6
    ((name, reason),) = images["skipped"]
    assert name == "torn.jpg"
    assert reason in (tmp_path / "out/report.md").read_text()


def test_one_image_and_chosen_pictures(folder: Path, tmp_path: Path) -> None:
    options = ["--images", folder, "--out", tmp_path / "out", "--max_images=1", "--picture_ids", "3.png"]
    assert analyze("--encoders", *ENCODERS, *options) == 0
    content = read(tmp_path / "out")
    assert content["images"]["analysed"] == 1
    assert content["cka"]["matrix"] == [[None] * 3] * 3
    assert "from left to right: `3.png`" in (tmp_path / "out/report.md").read_text()
    assert all(math.isfinite(one["norm_entropy"]["value"]) for one in content["encoders"])


def test_one_image_file_is_taken(folder: Path, tmp_path: Path) -> None:
    assert analyze("--encoders", "teacher:hog", "--images", folder / "3.png", "--out", tmp_path / "out") == 0
    assert read(tmp_path / "out")["images"] == {"analysed": 1, "skipped": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoders", "teacher:nobody", "--images={images}"], "No teacher named 'nobody'"),
        (["--encoders", "timm:mixer_s32_224@random", "--images={images}"], "cannot be told apart"),
        (["--encoders", "hog", "--images={images}"], "'hog' names no encoder; teacher:hog does"),
        (["--encoders", "teacher:hog", "teacher:hog", "--images={images}"], "twice"),
        (["--encoders", "teacher:hog", "--images={tmp}/empty"], "No image in"),
        (["--encoders", "teacher:hog", "--images={tmp}/torn"], "None of the 1 images can be read"),
        (["--encoders", "teacher:hog", "--images={images}", "--picture_ids", "9.png"], "no image '9.png'"),
        (["--encoders", "teacher:hog", "--images={images}", "--batch_size=0"], "--batch_size is 0"),
        (["--encoders", "teacher:hog", "--images={images}", "--scores={tmp}/none.csv"], "none.csv cannot be read"),
        (["--encoders", "random:vit_tiny", "--images={images}", "--image_size=100"], "16"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/a.png").write_bytes(b"no image")
    given = [argument.format(images=folder, tmp=tmp_path) for argument in arguments]
    assert analyze(*given, f"--out={tmp_path / 'out'}") == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    assert analyze("--encoders", "teacher:nobody", "--images", folder, f"--out={tmp_path}") == 1
    assert "no analysis" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert analyze("--encoders", "teacher:nobody", "--images", folder, "--out", tmp_path / "file/out") == 1
    assert "out cannot be written" in capsys.readouterr().err


def test_an_analysis_that_fails_leaves_the_earlier_one_as_it_was(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert analyze("--encoders", "teacher:hog", "--images", folder, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/a.png").write_bytes(b"no image")
    assert analyze("--encoders", "teacher:color", "--images", tmp_path / "torn", "--out", out, "--overwrite") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_encoders_may_be_a_list_in_a_config(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f'encoders: ["concat:hog,color"]\nimages: {folder}\nout: {tmp_path / "out"}\n')
    assert analyze("--config", config) == 0
    assert read(tmp_path / "out")["encoders"][0]["encoder"] == "concat:hog,color"
