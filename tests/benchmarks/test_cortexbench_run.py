"""The command run: refusals without a simulator, and whole runs in an environment that has one."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cortexbench import __main__ as command
from benchmarks.cortexbench.encoders import Eyes, open_all
from benchmarks.cortexbench.presets import PRESETS
from benchmarks.cortexbench.run_files import RunFiles
from benchmarks.cortexbench.run_plan import Learner, RunPlan, check_record
from benchmarks.cortexbench.running import choose_reference, too_short
from theia.errors import ConfigError
from theia.utils.files import write_whole

HAS_SIMULATOR = importlib.util.find_spec("metaworld") is not None
needs_simulator = pytest.mark.skipif(
    not HAS_SIMULATOR, reason="MetaWorld is not installed: pip install 'theia[simulation]'"
)


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["run", "--encoders", "blind", "pixels", "--data", str(data), "--out", str(out), "--preset", "smoke", *more]


@pytest.mark.skipif(HAS_SIMULATOR, reason="MetaWorld is installed")
def test_without_a_simulator_the_extra_is_named(tmp_path, capsys):
    assert command.main(arguments(tmp_path, tmp_path / "out")) == 1
    assert "pip install 'theia[simulation]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_loading_the_commands_loads_neither_torch_nor_the_simulator():
    code = "import benchmarks.cortexbench.__main__, sys; print([m for m in ('torch', 'mujoco') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_simulator_s_process_loads_no_torch():
    code = "import benchmarks.cortexbench.simulators, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_controls_are_offered_where_an_encoder_s_name_is_wrong():
    with pytest.raises(ConfigError, match=r"'blnd' names no encoder[\s\S]*blind +control: no picture"):
        open_all(["blnd"], "spatial", torch.device("cpu"))


def test_rollouts_shorter_than_the_demonstrations_need_are_said():
    def recording(*steps):
        return SimpleNamespace(originals=[SimpleNamespace(record={"success_step": step}) for step in steps])

    assert too_short("hammer-v3", recording(50, 70, None), 60) is not None
    assert "2 of 3 demonstrations succeed only later" in too_short("hammer-v3", recording(50, 70, 80), 60)
    assert too_short("hammer-v3", recording(50, 55, 80), 60) is None
    assert too_short("walker-walk", recording(None, None), 60) is None


def test_the_reference_is_found_by_name_or_label_before_anything_is_trained(tmp_path):
    eyes = [
        Eyes(name, label, None, 0, (1, 1), "", (0.0,))
        for name, label in (("blind", "blind"), ("/long/runs/a/exported", "runs/a"))
    ]
    files = RunFiles(tmp_path)
    assert choose_reference(None, eyes, files) is None
    assert choose_reference("/long/runs/a/exported", eyes, files) == "runs/a"
    assert choose_reference("runs/a", eyes, files) == "runs/a"
    with pytest.raises(ConfigError, match="'runs/b', which is none of the encoders: blind, /long"):
        choose_reference("runs/b", eyes, files)
    write_whole(files.encoder("runs/b"), "{}")  # of the same command with other encoders
    assert choose_reference("runs/b", eyes, files) == "runs/b"


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations") / "data"
    collect = ["collect", "--tasks=drawer-open,reach", f"--out={folder}", "--episodes=2", "--size=64", "--vary=camera"]
    assert command.main([*collect, "--spread=0.5", "--pictures=image", "--workers=2"]) == 0
    return folder


def outcomes(out: Path) -> dict[str, object]:
    """All that a run measured, without how long it took."""
    found = {}
    for path in sorted([*out.glob("policies/*/*/*/rollouts-*.json"), *out.glob("policies/*/*/*/shift-*.json")]):
        record = json.loads(path.read_text())
        found[str(path.relative_to(out))] = {name: part for name, part in record.items() if "seconds" not in name}
    return found


@needs_simulator
@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_what_it_would_have_found(demonstrations, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--workers=2", "--rollouts=3", "--videos=1", "--shift=texture,light")
    assert command.main(arguments(demonstrations, whole, *options)) == 0
    said = capsys.readouterr()
    assert "blind (control)" in said.out
    assert "At most about" in said.err
    assert "lossy" not in said.err + said.out
    assert len(list(whole.glob("videos/*.mp4"))) == 6  # two of them where the texture, and two where the light differs
    assert len({record["task"] for record in outcomes(whole).values() if "task" in record}) == 1  # smoke: the first
    assert len([name for name in outcomes(whole) if "shift-" in name]) == 4
    assert "another light" in said.out
    for stage in ("run.json", "policies/blind/*/*/policy.pt", "policies/pixels/*/*/rollouts-*.json"):
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cortexbench", *arguments(demonstrations, killed, *options)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while not any(killed.glob(stage)) and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert command.main(arguments(demonstrations, killed, *options)) == 0
    assert outcomes(killed) == outcomes(whole)
    capsys.readouterr()
    # Whatever differs from what the folder was begun with is refused.
    assert command.main(arguments(demonstrations, killed, "--rollouts=4")) == 1
    assert "begun with rollouts 3, not 4" in capsys.readouterr().err


def test_tasks_may_be_added_and_what_is_there_must_stay_the_same(tmp_path):
    pytest.importorskip("pyarrow")
    one, other = (TaskSettings(tmp_path, task) for task in ("pen", "relocate"))
    files = RunFiles(tmp_path / "out")
    for settings in (one, other, one):
        check_record(settings.plan, files)
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert set(record["settings"]["data"]) == {"pen", "relocate"}
    one.known = "others"
    with pytest.raises(ConfigError, match="begun with other demonstrations of pen"):
        check_record(one.plan, files)
    one.known, one.simulators = "pen", {"mujoco": "2"}
    with pytest.raises(ConfigError, match="begun with another release of mujoco"):
        check_record(one.plan, files)


class TaskSettings:
    """Settings of a run on demonstrations of one task."""

    def __init__(self, folder, task):
        self.task, self.known, self.simulators = task, task, {"mujoco": "1", task: "3"}

    @property
    def plan(self):
        settings = {"epochs": 3, "data": {self.task: self.known}, "simulator": self.simulators}
        return SimpleNamespace(record=lambda: settings, data=SimpleNamespace(about={}))


@needs_simulator
@pytest.mark.slow
def test_the_demonstrations_of_a_run_are_known_by_their_content(demonstrations, tmp_path):
    there = RunPlan.make(demonstrations, "reach", PRESETS["smoke"], "smoke", None, 2, None, "spatial", Learner())
    moved = tmp_path / "moved"
    shutil.copytree(demonstrations, moved, copy_function=shutil.copy)  # without their times
    (moved / "policies").mkdir()
    (moved / "policies/notes.txt").touch()
    here = RunPlan.make(moved, "reach", PRESETS["smoke"], "smoke", None, 2, None, "spatial", Learner())
    assert here.record() == there.record()
    all_of_them = RunPlan.make(moved, None, PRESETS["full"], "full", None, 2, None, "spatial", Learner())
    assert all_of_them.record()["data"]["reach-v3"] == here.record()["data"]["reach-v3"]


@needs_simulator
@pytest.mark.slow
def test_two_runs_into_one_folder_are_refused(demonstrations, tmp_path, capsys):
    from theia.utils.files import alone

    with alone(tmp_path):
        assert command.main(arguments(demonstrations, tmp_path)) == 1
    assert "Another process works in" in capsys.readouterr().err


@needs_simulator
@pytest.mark.slow
def test_wrong_data_and_tasks_are_refused(demonstrations, tmp_path, capsys):
    for options, message in (
        (("--tasks=hammer",), "has no demonstrations of hammer-v3. It has: drawer-open-v3, reach-v3"),
        (("--tasks=draw-open",), "Is it 'drawer-open'?"),
        (("--vary=wind",), "--vary has 'wind'"),
        (("--shift=wind",), "--shift has 'wind'"),
        (("--shift=camera",), "vary already"),
    ):
        assert command.main(arguments(demonstrations, tmp_path / "out", *options)) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_simulator
@pytest.mark.slow
def test_the_rollouts_begin_as_the_environment_does_and_the_expert_succeeds_in_them():
    """Through the processes, an expert does as well as in the environment itself."""
    import numpy as np

    from benchmarks.cortexbench.demonstrations import attempt
    from benchmarks.cortexbench.simulation import open_environment
    from benchmarks.cortexbench.simulators import Command, Course, Simulators

    course = Course("drawer-open-v3", (1_000_000, 1_000_001, 1_000_002), ("camera",), 1.0, 64, "fast", 32, 200, None)
    with open_environment("drawer-open", 64, "fast", ("camera",)) as environment, Simulators(course, 2) as simulators:
        for number, seed in enumerate(course.seeds):
            trial = attempt(environment, seed, 0.0, 5)
            slot = number % 2
            simulators.send(Command(slot, True, seed=seed))
            first = simulators.receive(slot)
            np.testing.assert_array_equal(first.observation, trial.observations[0])
            assert first.picture.shape == (3, 32, 32)
            for action in trial.actions:
                simulators.send(Command(slot, False, action=action))
                last = simulators.receive(slot)
            assert last.success == trial.at_end
            assert last.picture is None


@needs_simulator
@pytest.mark.slow
def test_a_simulator_that_is_killed_is_said_to_be_gone():
    from benchmarks.cortexbench.simulation import SimulationError
    from benchmarks.cortexbench.simulators import Command, Course, Simulators

    course = Course("drawer-open-v3", (1_000_000, 1_000_001), (), 1.0, 64, "fast", 32, 200, None)
    with Simulators(course, 1) as simulators:
        simulators.send(Command(0, False, seed=0))
        simulators.receive(0)
        simulators._processes[0].kill()
        simulators._processes[0].join()
        with pytest.raises(SimulationError, match="simulates drawer-open-v3 is gone"):
            simulators.receive(0)


@needs_simulator
@pytest.mark.slow
def test_a_policy_is_shown_in_rollouts_what_it_was_fitted_on(demonstrations):
    import numpy as np

    from benchmarks.cortexbench.demonstrations import SCENE_STATE
    from benchmarks.cortexbench.encoders import TaskRecording
    from benchmarks.cortexbench.simulators import Command, Course, Simulators
    from theia.extraction.images import to_square
    from theia.trajectories.lerobot import ACTION, LeRobotFolder

    folder = LeRobotFolder(demonstrations)
    recording = TaskRecording(folder, "drawer-open-v3", 2)
    episode = recording.episodes[1]
    rows = recording.rows[episode.start : episode.start + episode.length]
    actions, observations = folder.column(ACTION)[rows], folder.column(SCENE_STATE)[rows]
    seeds = (int(episode.record["seed"]),)
    course = Course("drawer-open-v3", seeds, ("camera",), 0.5, 64, "fast", 224, 200, None)
    pictures = recording.frames(episode, folder.camera(), range(episode.length))
    with Simulators(course, 1) as simulators:
        simulators.send(Command(0, True, seed=seeds[0]))
        for picture, action, observation in zip(pictures, actions, observations, strict=True):
            moment = simulators.receive(0)
            np.testing.assert_array_equal(moment.picture, to_square(picture, 224, "squash"))
            np.testing.assert_allclose(moment.observation, observation, atol=1e-6)
            simulators.send(Command(0, True, action=action))
