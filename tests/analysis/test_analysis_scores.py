from pathlib import Path

import pytest

from theia.analysis.scores import Score, correlations, read_scores
from theia.errors import ConfigError


def written(path: Path, text: str) -> Path:
    (path / "scores.csv").write_text(text)
    return path / "scores.csv"


def test_a_file_is_read_by_its_columns(tmp_path: Path) -> None:
    path = written(tmp_path, 'group, score,encoder,note\n,0.5,"concat:a,b",x\nmine,-1,timm:vit,y\n,3,unknown,z\n')
    found = read_scores(path, ["concat:a,b", "timm:vit", "other"])
    assert found == {"concat:a,b": Score(0.5), "timm:vit": Score(-1, "mine")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encoder,value\na,1\n", "no column score"),
        ("", "no column encoder and no score"),
        ("encoder,score\na,good\n", "Line 2 .* 'good'"),
        ("encoder,score\na,nan\n", "no number"),
        ("encoder,score\na\n", "no number"),
        ("encoder,score\na,1\na,2\n", "Line 3 .* second time"),
        ("encoder,score\nb,1\n", "none of the encoders"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_scores(written(tmp_path, text), ["a"])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_scores(tmp_path / "none.csv", ["a"])


def test_groups_are_correlated_apart() -> None:
    """Within each group the score rises with the figure; over both it falls."""
    figure = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 11.0, "e": 12.0, "f": 13.0, "g": None, "h": 5.0}
    scores = {"a": 11.0, "b": 12.0, "c": 13.0, "d": 1.0, "e": 2.0, "f": 3.0, "g": 4.0}
    groups = {name: "distilled" if name in "abc" else "regular" for name in figure}

    found = {one.group: one for one in correlations({"entropy": figure}, scores, groups)}
    assert {name: one.n for name, one in found.items()} == {"distilled": 3, "regular": 3, "all": 6}
    assert found["distilled"].r == found["regular"].r == pytest.approx(1)
    assert found["all"].r is not None
    assert found["all"].r < -0.9
