"""What collecting does without a simulator: bookkeeping, and refusals before anything is written."""

import importlib.util
import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cortexbench import __main__ as command
from benchmarks.cortexbench import collect as collecting
from benchmarks.cortexbench import simulation
from benchmarks.cortexbench.demonstrations import MOST_ATTEMPTS, Plan, first_success
from benchmarks.cortexbench.recordings import check_options, keep_options
from benchmarks.cortexbench.simulation import SimulationError, find_opengl
from benchmarks.cortexbench.tasks import find_tasks
from theia.errors import ConfigError, TrajectoryError

PLAN = Plan(("hammer-v3", "drawer-open-v3"), 0, (), 1.0, 0.0, 20, 64, "fast", "video")


def test_a_failed_demonstration_is_dropped_counted_and_replaced_by_the_next_seed() -> None:
    tried: list[int] = []

    def attempt(seed: int) -> str | None:
        tried.append(seed)
        return "done" if len(tried) == 3 else None

    found = first_success(attempt, 100, 4, "hammer-v3")
    assert found == ("done", tried[2], 2)
    assert len(set(tried)) == 3
    assert tried[0] == 104


def test_no_seed_is_used_twice() -> None:
    tried: list[int] = []

    def attempt(seed: int) -> bool | None:
        tried.append(seed)
        return True if len(tried) % 3 == 0 else None

    for number in range(50):
        first_success(attempt, 0, number, "hammer-v3")
    assert len(set(tried)) == len(tried) == 150


def test_an_expert_that_never_succeeds_is_given_up() -> None:
    with pytest.raises(SimulationError, match=rf"{MOST_ATTEMPTS} times.*demonstration 7 of hammer-v3"):
        first_success(lambda seed: None, 0, 7, "hammer-v3")


def test_further_demonstrations_do_not_renumber_earlier_ones() -> None:
    assert sorted(PLAN.index(task, number) for task in PLAN.tasks for number in range(5)) == list(range(10))
    assert {PLAN.index(task, number) for task in PLAN.tasks for number in range(2)} == set(range(4))


def test_the_table_counts_failures_in_the_rate_of_success() -> None:
    row = {"dropped": 0, "success_at_end": 1, "length": 80, "seconds": 4.0}
    rows = [
        {**row, "tasks": ["hammer-v3"]},
        {**row, "tasks": ["assembly-v3"], "dropped": 2, "length": 100},
        {**row, "tasks": ["assembly-v3"], "success_at_end": 0},
    ]
    summaries = collecting.summarize(rows)
    assert summaries == [("hammer-v3", 1, 1, 1, 80, 4.0, ()), ("assembly-v3", 2, 4, 1, 180, 8.0, ())]
    last = collecting.table(summaries).splitlines()[-1].split()
    assert last == ["assembly-v3", "2", "50%", "2", "50%", "90", "8", "22"]


def test_tasks_are_found_without_their_version_and_by_group() -> None:
    assert find_tasks(["door-open", "hammer-v3", "door-open-v3"]) == ["door-open-v3", "hammer-v3"]
    assert find_tasks(["metaworld", "door-open"]) == [
        "assembly-v3", "bin-picking-v3", "button-press-topdown-v3", "drawer-open-v3", "hammer-v3", "door-open-v3",
    ]  # fmt: skip


def test_an_unknown_task_gets_the_nearest_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"'drawr-open'.*Is it 'drawer-open'\?.*metaworld.*assembly, basketball"):
        find_tasks(["drawr-open"])


def test_without_a_simulator_the_extra_is_named_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("metaworld", "mujoco") else found(name)
    )
    assert command.main(["collect", "--tasks=metaworld", f"--out={tmp_path / 'data'}"]) == 1
    assert "pip install 'theia[simulation]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_opengl_the_packages_of_the_system_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def run(arguments: list[str], env: dict[str, str], **options: Any) -> Any:
        tried.append(env["MUJOCO_GL"])
        return subprocess.CompletedProcess(arguments, 1, "", "Traceback\nImportError: no library")

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match=r"egl: ImportError: no library.*apt-get install .*libosmesa6"):
        find_opengl()
    assert tried == ["egl", "osmesa"]
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(ConfigError, match=r"with MUJOCO_GL=glfw \(glfw: ImportError: no library\)"):
        find_opengl()
    assert tried[2:] == ["glfw"]


def test_a_library_that_was_chosen_and_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(simulation, "check_installed", lambda *_: None)
    monkeypatch.setattr(simulation, "find_opengl", lambda: None)
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"MUJOCO_GL=osmesa.*glGetError.*apt-get install"):
        simulation.load_mujoco.__wrapped__()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--episodes=0", "--episodes is 0"),
        ("--size=63", "even number"),
        ("--noise=2", "--noise is 2.0"),
        ("--after_success=501", "at most 500"),
        ("--workers=0", "--workers is 0"),
        ("--vary=wind", "'wind'"),
        ("--tasks=", "--tasks is empty"),
        ("--tasks=hammr", "Is it 'hammer'?"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    option: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collecting, "check_installed", lambda *_: None)
    assert command.main(["collect", "--tasks=hammer", f"--out={tmp_path / 'data'}", option]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_goes_on_with_the_options_that_it_was_begun_with(tmp_path: Path) -> None:
    keep_options(tmp_path, asdict(PLAN))
    check_options(tmp_path, asdict(PLAN))
    with pytest.raises(TrajectoryError, match=r"begun with noise 0\.0, not 0\.1"):
        check_options(tmp_path, asdict(replace(PLAN, noise=0.1)))


def test_a_folder_with_other_physics_is_refused(tmp_path: Path) -> None:
    settings = {**asdict(PLAN), "simulator": {"mujoco": "3.3.0"}}
    keep_options(tmp_path, settings)
    path = tmp_path / "meta/collection.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "simulator": {**written["simulator"], "mujoco": "2.3.7"}}))
    with pytest.raises(TrajectoryError, match=r"begun with simulator.*2\.3\.7"):
        check_options(tmp_path, settings)


def test_a_data_set_of_other_origin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta/episodes/chunk-000").mkdir(parents=True)
    (tmp_path / "meta/episodes/chunk-000/file-000.parquet").touch()
    with pytest.raises(TrajectoryError, match="not recorded by this command"):
        check_options(tmp_path, asdict(PLAN))
