from pathlib import Path

import pytest

from theia.ablation.summary import Scored, higher_is_better, merge_external, read_external, summarise
from theia.errors import ConfigError

READOUT = "readout/explained_variance"


def run(row: str, seed: int, **scores: float) -> Scored:
    named = {name.replace("__", "/"): value for name, value in scores.items()}
    return Scored(row=row, seed=seed, teachers=tuple(row.split("+")), scores=named, options={"data.teachers": [row]})


def external(tmp_path: Path, text: str, scored: list[Scored]) -> list[Scored]:
    (tmp_path / "robot.csv").write_text(text)
    planned: dict[str, list[int]] = {}
    for one in scored:
        assert one.seed is not None
        planned.setdefault(one.row, []).append(one.seed)
    merged, waiting = merge_external(scored, read_external(tmp_path / "robot.csv", planned))
    assert waiting == []
    return merged


@pytest.mark.parametrize(
    ("column", "higher"),
    [
        ("test/loss", False), ("test/mse/clip", False), ("test/smooth_l1/clip", False), ("device_hours", False),
        ("test/cosine/loss", True), ("readout/explained_variance", True), ("images_per_s", True),
        ("external/success", True),
    ],
)  # fmt: skip
def test_losses_and_costs_are_better_when_lower(column: str, higher: bool) -> None:
    assert higher_is_better(column) is higher


def test_rows_come_best_first() -> None:
    scored = [run("a", 0, test__loss=0.3, x=1), run("b", 0, test__loss=0.1, x=2), run("c", 0, test__loss=0.2, x=3)]
    assert [row.name for row in summarise(scored, sort_by="test/loss").rows] == ["b", "c", "a"]
    assert [row.name for row in summarise(scored, sort_by="x").rows] == ["c", "b", "a"]


def test_a_row_is_the_mean_of_its_seeds() -> None:
    summary = summarise([run("a", 2, x=3), run("b", 0, x=9), run("a", 0, x=1), run("a", 1, x=2)])
    a = summary.rows[1]
    assert a.seeds == (0, 1, 2)
    assert a.values == {0: 1, 1: 2, 2: 3}
    assert (a.columns["x"].mean, a.columns["x"].n) == (2, 3)


def test_differences_are_to_the_reference() -> None:
    scored = [run("a", 0, x=3), run("a", 1, x=5), run("b", 1, x=1), run("c", 9, x=0)]
    a, b, c = summarise(scored, reference="b").rows
    assert a.difference is not None
    assert (a.difference.mean, a.difference.n) == (4, 1)
    assert b.difference is None
    assert c.difference is None


def test_rows_without_the_score_come_last_and_stay() -> None:
    summary = summarise([run("a", 0, y=1), run("b", 0, x=1), run("c", 0, x=2)], sort_by="x", reference="a")
    assert [row.name for row in summary.rows] == ["c", "b", "a"]
    assert summary.rows[2].values == {}
    assert [row.difference for row in summary.rows] == [None] * 3


def test_by_default_a_score_is_chosen_that_all_rows_have() -> None:
    both = {"readout__explained_variance": 0.5, "test__loss": 0.1}
    scored = [run("a", 0, **both), run("b", 0, **both)]
    assert summarise(scored).sort_by == READOUT
    assert summarise([*scored, run("c", 0, test__loss=0.2)]).sort_by == "test/loss"
    assert summarise([*scored, run("a", 1, test__loss=0.2)]).sort_by == READOUT
    assert summarise([run("a", 0, x=1, y=1), run("b", 0, y=1)]).sort_by == "y"
    lonely = summarise([run("a", 0, x=1), run("b", 0, y=1)])
    assert (lonely.sort_by, len(lonely.rows)) == ("x", 2)
    assert summarise(scored).chosen != summarise(scored, sort_by=READOUT).chosen


def test_transfer_is_read_for_every_teacher() -> None:
    a = {"readout__explained_variance__a": 0.6, "readout__explained_variance__b": 0.2}
    scored = [
        run("a", 0, test__loss=1, **a),
        run("a", 1, test__loss=1, **{name: 0.4 for name in a}),
        run("b", 0, test__loss=2),
    ]
    summary = summarise(scored)
    assert summary.readable == ("a", "b")
    assert summary.transfer(summary.rows[0]) == pytest.approx([0.5, 0.3])
    assert summary.transfer(summary.rows[1]) == [None, None]


def test_entropy_is_correlated_over_means_of_rows() -> None:
    points = {"a": (1, 1), "b": (2, 3), "c": (3, 2)}
    scored = [
        run(name, seed, x=x + off, test__norm_entropy=y + off)
        for name, (x, y) in points.items() for seed, off in enumerate([-5, 5])
    ]  # fmt: skip
    summary = summarise(scored, sort_by="x")
    assert summary.entropy is not None
    assert (summary.entropy.r, summary.entropy.n) == (pytest.approx(0.5), 3)
    assert summarise(scored, sort_by="test/norm_entropy").entropy is None


def test_scores_that_are_not_finite_are_missing() -> None:
    nan = float("nan")
    summary = summarise([run("a", 0, x=nan, y=1), run("a", 1, x=2, y=1), run("b", 0, x=nan, y=1)], sort_by="x")
    assert summary.rows[0].values == {1: 2}
    assert (summary.rows[1].name, summary.rows[1].values) == ("b", {})


def test_unknown_names_are_answered_with_the_known() -> None:
    scored = [run("a", 0, x=1), run("b", 0, y=1)]
    with pytest.raises(ConfigError, match=r"'z'.*x, y"):
        summarise(scored, sort_by="z")
    with pytest.raises(ConfigError, match=r"'c'.*a; b"):
        summarise(scored, reference="c")
    with pytest.raises(ConfigError, match="score"):
        summarise([])


def test_external_scores_join_their_runs(tmp_path: Path) -> None:
    scored = [run("a", 0, x=1), run("a", 1, x=1), run("b", 0, x=1)]
    merged = external(tmp_path, "seed,row,lift,reach\n1,a,0.5,\n\n0, a ,0.25,1\n", scored)
    assert [one.scores for one in merged] == [
        {"x": 1, "external/lift": 0.25, "external/reach": 1}, {"x": 1, "external/lift": 0.5}, {"x": 1},
    ]  # fmt: skip
    assert scored[0].scores == {"x": 1}


@pytest.mark.parametrize("text", ["row,success\na,0.5\n", "\ufeffrow,seed,success\r\na,,0.5\r\n"])
def test_a_score_of_a_whole_row_is_one_observation(tmp_path: Path, text: str) -> None:
    scored = [run("a", 0, x=1), run("a", 1, x=2), run("b", 0, x=1)]
    summary = summarise(external(tmp_path, text, scored), sort_by="external/success", reference="b")
    assert [row.name for row in summary.rows] == ["a", "b"]
    a = summary.rows[0]
    assert (a.seeds, a.columns["x"].n) == ((0, 1), 2)
    success = a.columns["external/success"]
    assert (success.mean, success.low, success.n) == (0.5, None, 1)


def test_scores_of_whole_rows_are_compared_without_an_interval(tmp_path: Path) -> None:
    scored = external(tmp_path, "row,success\na,0.75\nb,0.5\n", [run("a", 0, x=1), run("b", 3, x=1)])
    difference = summarise(scored, sort_by="external/success", reference="b").rows[0].difference
    assert difference is not None
    assert (difference.mean, difference.n, difference.p) == (0.25, 1, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the columns are missing"),
        ("row,seed\na,0\n", "line 1: the columns are row,seed"),
        ("seed,x\n0,1\n", "line 1: the columns are seed,x"),
        ("row,seed,x,x\na,0,1,1\n", "each once"),
        ("row;seed;x\na;0;1\n", "separated by commas"),
        ("row,seed,x\n", "no line below"),
        ("row,seed,x\n\na,0\n", "line 3: 2 cells under 3 columns"),
        ("row,seed,x\na,0,1\nc,0,1\n", "line 3: the sweep has no row 'c'"),
        ("row,seed,x\na,7,1\n", "line 2: row 'a' has no seed 7"),
        ("row,seed,x\na,first,1\n", "line 2: the seed is 'first'"),
        ("row,seed,x\na,0,good\n", "line 2: x is 'good'"),
        ("row,seed,x\na,0,nan\n", "line 2: x is 'nan'"),
        ("row,seed,x\na,0,1\na,1,2\na,0,1\n", "line 4: line 2 has 'x' of row 'a'"),
        ("row,seed,x\na,0,1\na,,2\n", "without"),
    ],
)
def test_errors_in_external_scores_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        external(tmp_path, text, [run("a", 0, x=1), run("a", 1, x=1), run("b", 0, x=1)])
    assert message in str(error.value)
    assert str(tmp_path / "robot.csv") in str(error.value)


def test_external_scores_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        read_external(tmp_path / "absent.csv", {})


def test_external_scores_of_what_is_not_finished_wait(tmp_path: Path) -> None:
    (tmp_path / "robot.csv").write_text("row,seed,x\na,0,1\na,1,2\nb,,3\n")
    added = read_external(tmp_path / "robot.csv", {"a": [0, 1], "b": [0]})
    merged, waiting = merge_external([run("a", 0, y=1)], added)
    assert [one.scores for one in merged] == [{"y": 1, "external/x": 1}]
    assert waiting == ["a, seed 1", "b"]


def test_less_may_be_better() -> None:
    scored = [run("a", 0, external__seconds=3), run("b", 0, external__seconds=2), run("c", 0, external__seconds=2)]
    summary = summarise(scored, "external/seconds", lower_is_better=["external/seconds"])
    assert [row.name for row in summary.rows] == ["b", "c", "a"]
    assert [summary.rank(row) for row in summary.rows] == [1, 1, 3]  # equals share a rank
    assert [row.name for row in summarise(scored, "external/seconds").rows] == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="'seconds'"):
        summarise(scored, lower_is_better=["seconds"])
