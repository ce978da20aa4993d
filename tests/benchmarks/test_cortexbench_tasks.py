"""Names of tasks, and what their episodes are worth."""

import pytest

from benchmarks.cortexbench.tasks import GROUPS, TASKS, check_fit, find_tasks, folders_of
from theia.errors import ConfigError


def test_groups_stand_for_the_tasks_of_the_paper():
    assert find_tasks(["dmc", "adroit", "walker-walk"]) == [
        "walker-stand", "walker-walk", "reacher-easy", "cheetah-run", "finger-spin", "pen", "relocate",
    ]  # fmt: skip
    assert sum(len(names) for group, names in GROUPS.items() if group != "small") == 12
    assert {TASKS[name].horizon for name in GROUPS["dmc"]} == {1000}
    assert [(TASKS[name].horizon, TASKS[name].proprioception) for name in GROUPS["adroit"]] == [(100, 24), (200, 30)]


def test_an_unknown_task_of_any_simulator_gets_the_nearest():
    with pytest.raises(
        ConfigError, match=r"'walker-wlk'. Is it 'walker-walk'\? Groups: small, metaworld, dmc, adroit. Tasks"
    ):
        find_tasks(["walker-wlk"])
    with pytest.raises(ConfigError, match=r"Is it 'relocate'\?"):
        find_tasks(["relocat"])


def test_tasks_with_the_same_columns_share_a_folder(tmp_path):
    assert folders_of(["hammer-v3", "assembly-v3"], tmp_path) == {".": ["hammer-v3", "assembly-v3"]}
    assert folders_of(["hammer-v3", "pen", "assembly-v3", "walker-walk"], tmp_path) == {
        "metaworld": ["hammer-v3", "assembly-v3"], "pen": ["pen"], "walker-walk": ["walker-walk"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "at_end", "fulfilled", "success"),
    [
        ("hammer-v3", True, 1, True),
        ("hammer-v3", False, 400, False),
        ("pen", True, 20, False),
        ("pen", False, 21, True),
        ("relocate", True, 25, False),
        ("relocate", False, 26, True),
    ],
)
def test_success_is_at_the_end_in_metaworld_and_a_number_of_steps_in_adroit(task, at_end, fulfilled, success):
    assert TASKS[task].success(at_end, fulfilled) is success
    assert TASKS[task].value(success, -3.0, 100) == float(success)


def test_a_score_is_the_return_divided_by_ten_for_a_thousand_steps():
    task = TASKS["cheetah-run"]
    assert task.success(False, 0) is None
    assert 100 * task.value(None, 480.0, 1000) == pytest.approx(48.0)
    assert 100 * task.value(None, 48.0, 100) == pytest.approx(48.0)


def test_distractors_need_a_table():
    check_fit(["hammer-v3", "pen"], ["distractor"])
    check_fit(["walker-walk"], ["camera", "light", "texture"])
    with pytest.raises(ConfigError, match="--shift has 'distractor', but distractors lie on a table, and walker-walk"):
        check_fit(["pen", "walker-walk"], ["distractor"], "--shift")
