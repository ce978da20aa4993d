import pytest

from theia.ablation.grid import Row, expand, teacher_sets
from theia.errors import ConfigError

POOL = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ("singles", {"a": ["a"], "b": ["b"], "c": ["c"]}),
        ("all", {"all": POOL}),
        ("leave_one_out", {"all": POOL, "b+c": ["b", "c"], "a+c": ["a", "c"], "a+b": ["a", "b"]}),
        ("all_pairs", {"a+b": ["a", "b"], "a+c": ["a", "c"], "b+c": ["b", "c"]}),
        (["all", ["c", "a"], "leave_one_out"], {"all": POOL, "c+a": ["c", "a"], "b+c": ["b", "c"], "a+b": ["a", "b"]}),
        (None, {}),
    ],
)
def test_sets_of_teachers(sets: object, expected: dict) -> None:
    assert teacher_sets(sets, POOL) == expected


def test_powerset_has_every_set_but_the_empty_one() -> None:
    found = teacher_sets("powerset", ["a", "b", "c", "d"])
    assert len(found) == 2**4 - 1
    assert list(found)[:4] == ["a", "b", "c", "d"]
    assert list(found)[-5:] == ["all-d", "all-c", "all-b", "all-a", "all"]


def test_one_teacher_can_be_left_out_of_nothing() -> None:
    assert teacher_sets("leave_one_out", ["a"]) == {"a": ["a"]}


def test_rows_are_repeated_for_every_combination() -> None:
    found = expand({"x": {"model.loss": "mse"}}, "singles", {"model.registers": [0, 4], "model.size": ["tiny"]}, ["a"])
    assert found == [
        Row("x,registers=0,size=tiny", {"model.loss": "mse", "model.registers": 0, "model.size": "tiny"}),
        Row("x,registers=4,size=tiny", {"model.loss": "mse", "model.registers": 4, "model.size": "tiny"}),
        Row("a,registers=0,size=tiny", {"data.teachers": ["a"], "model.registers": 0, "model.size": "tiny"}),
        Row("a,registers=4,size=tiny", {"data.teachers": ["a"], "model.registers": 4, "model.size": "tiny"}),
    ]


def test_a_product_alone() -> None:
    assert [row.name for row in expand(product={"data.teachers": [["a", "b"], ["a"]]})] == [
        "teachers=a+b",
        "teachers=a",
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "no rows"),
        ({"rows": {}}, "no rows"),
        ({"product": {"model.size": []}}, "product.model.size"),
        ({"teachers": "triples"}, "'triples'.*leave_one_out"),
        ({"teachers": [["a", "a"]]}, "twice"),
        ({"teachers": [[]]}, "is empty"),
        ({"rows": {"a": {"x.y": 1}}, "teachers": [["a"]]}, "called 'a'"),
        ({"rows": {"../a": {}}}, r"called '\.\./a'"),
        ({"rows": {".git": {}}}, "called .*folder"),
        ({"product": {"model.weights": ["/a/b.pth"]}}, "rows"),
        ({"rows": {"Slurm": {}}}, "called 'Slurm'"),
        ({"rows": {"a": {}, "A": {}}}, "called 'a'"),
        ({"rows": {"a": {"run_folder": "x"}}}, "run_folder"),
        ({"rows": {"a": {"model.size": "tiny"}}, "product": {"model.size": ["base"]}}, "model.size"),
    ],
)
def test_what_is_no_grid_is_refused(grid: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(**grid, pool=POOL)
