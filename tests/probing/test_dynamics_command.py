"""``theia probe dynamics`` as its users call it."""

import json
from pathlib import Path

import pytest
from PIL import Image
from trajectories.discs import record

from theia.cli.main import main
from theia.utils.files import alone


def test_the_table_has_controls_and_the_picture_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, other = record(tmp_path / "data", episodes=5, frames=8), record(tmp_path / "other", 1, episodes=2, frames=8)
    command = ["probe", "dynamics", "--encoders", "random:vit_tiny", "--data", f"lerobot:{data}#top"]
    command += ["--test", str(other), "--horizon", "3", "--out", str(tmp_path / "out")]

    assert main(command) == 0

    shown = capsys.readouterr().out
    for name in ("blind", "state", "pixels", "random:vit_tiny", "plan, other", "motion, data"):
        assert name in shown
    (record_file,) = (tmp_path / "out").glob("*.json")
    report = json.loads(record_file.read_text())
    assert report["settings"]["target"] == "displacement"
    assert report["reference"] == "random:vit_tiny"
    with Image.open(record_file.with_suffix(".png")) as picture:
        assert picture.size[0] > 400
    # The embeddings serve the next run.
    embeddings = sorted((tmp_path / "out/embeddings").rglob("tokens.npy"))
    times = [file.stat().st_mtime_ns for file in embeddings]
    assert main(command) == 0
    assert [file.stat().st_mtime_ns for file in embeddings] == times


def test_the_transformer_reads_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from theia.probing import dynamics
    from theia.probing.token_transformer import Rule

    monkeypatch.setattr(dynamics, "SMALL", Rule(width=16, layers=1, hidden=16, positions=True, least_steps=5, epochs=1))
    data = record(tmp_path / "data", episodes=5, frames=8)
    command = ["probe", "dynamics", "--encoders", "pixels", "--data", str(data), "--horizon", "3"]
    command += ["--readout", "transformer", "--seeds", "0,1", "--out", str(tmp_path / "out")]

    assert main(command) == 0

    (record_file,) = (tmp_path / "out").glob("*.json")
    errors = json.loads(record_file.read_text())["errors"]["pixels"]["motion"]["data"]
    assert [len(seed) for seed in errors] == [1, 1]


@pytest.mark.parametrize(
    ("options", "noun"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--camera", "wrist"], "observation.images.top"),
        (["--reference", "clip"], "--reference"),
        (["--horizon", "0"], "horizon"),
        (["--test", "nowhere"], "nowhere"),
        (["--encoders", "pixels", "pixels"], "twice"),
        (["--encoders", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], noun: str
) -> None:
    data = record(tmp_path / "data", episodes=2, frames=6)
    command = ["probe", "dynamics", "--encoders", "pixels", "--data", str(data), "--horizon", "3"]

    assert main([*command, "--out", str(tmp_path / "out"), *options]) == 1

    assert noun in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_runs_into_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = record(tmp_path / "data", episodes=2, frames=6)
    with alone(tmp_path / "out"):
        command = ["probe", "dynamics", "--encoders", "pixels", "--data", str(data), "--horizon", "3"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "Another process" in capsys.readouterr().err
