"""MetaWorld itself, in an environment that has it: pip install '.[dev,simulation]'."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cortexbench import simulation
from benchmarks.cortexbench.demonstrations import SCENE_STATE, attempt, look
from benchmarks.cortexbench.scenes import Factor, Scene
from benchmarks.cortexbench.simulation import Environment, SimulationError, open_environment
from benchmarks.cortexbench.tasks import TASKS
from theia.errors import ConfigError
from theia.trajectories.lerobot import LeRobotFolder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="MetaWorld is not installed; it holds mujoco back: pip install 'theia[simulation]'",
)
SIZE = 64


def environment(task: str = "drawer-open", **options: Any) -> Environment:
    return open_environment(task, SIZE, **options)


def upstream(task: str, seed: int) -> Any:
    """The task as MetaWorld gives it."""
    simulation.load_mujoco()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    made = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"]()
    made._freeze_rand_vec, made.seeded_rand_vec = False, True
    made.seed(seed)
    return made


def test_an_episode_is_a_function_of_its_seed() -> None:
    with environment(vary=("camera", "light")) as used, environment(vary=("camera", "light")) as fresh:
        attempt(used, 5, 0.0, 20)
        used.reset(8)
        used.render()
        assert np.array_equal(used.reset(3), fresh.reset(3))
        assert used.scene == fresh.scene
        assert np.array_equal(used.positions, fresh.positions)
        assert np.array_equal(used.render(), fresh.render())
        for action in np.random.default_rng(0).uniform(-1, 1, (20, 4)):
            assert np.array_equal(used.step(action).observation, fresh.step(action).observation)


@pytest.mark.parametrize("task", ["dial-turn", "drawer-open", "faucet-open", "window-open", "hammer"])
def test_the_first_observation_shows_things_where_they_are(task: str) -> None:
    with environment(task) as made:
        for seed in range(3):
            first = made.reset(seed).copy()
            second = made.step(np.zeros(4)).observation
            assert np.abs(first[4:18] - second[4:18]).max() < 0.01
            assert np.array_equal(first[:18], first[18:36])


def test_seeds_differ_in_what_they_begin_with() -> None:
    with environment() as made:
        assert len({tuple(made.reset(seed)[-3:]) for seed in range(5)}) == 5


def test_an_observation_holds_the_goal() -> None:
    with environment("assembly") as made:
        observation = made.reset(3)
        assert observation.shape == (39,)
        assert np.array_equal(observation[-3:], made._environment._target_pos)
        moved = made.step(np.array([0.0, 1, 0, 0]))
        assert np.array_equal(moved.observation[-3:], observation[-3:])
        assert moved.observation[1] > observation[1]


def test_the_view_is_that_of_the_published_camera() -> None:
    mujoco = simulation.load_mujoco()
    with environment() as made:
        made.reset(0)
        made._environment.data.qpos[:] = 0
        spec = mujoco.MjSpec.from_file(made._environment.model_name)
        camera = spec.worldbody.add_camera(
            name="top_cap2", pos=[0, 0.9, 0.6], mode=mujoco.mjtCamLight.mjCAMLIGHT_TARGETBODY, targetbody="tablelink"
        )
        assert camera.fovy == 45
        model = spec.compile()
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        model.vis.quality.offsamples = 0
        view = made.own_view
        free = mujoco.MjvCamera()
        free.azimuth, free.elevation, free.distance = view.azimuth_deg, view.elevation_deg, view.distance_m
        free.lookat = view.look_at_m
        pictures = []
        with mujoco.Renderer(model, SIZE, SIZE) as renderer:
            for one in ("top_cap2", free):
                renderer.update_scene(data, one)
                pictures.append(renderer.render().astype(int))
        assert pictures[0].std() > 20
        assert np.abs(pictures[0] - pictures[1]).mean() < 1


def test_light_changes_the_colours_that_it_is_drawn_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with environment() as made:
        own, scene = made.own_view, (0.3, 0.3, 0.3)
        monkeypatch.setattr(simulation, "draw_scene", lambda *_: Scene(own, scene))
        made.reset(0)
        before = made.render()
        # Darker than the task is: OpenGL does not light a surface beyond its own colour.
        scene = (0.15, 0.3, 0.3)
        made.reset(0)
        after = made.render()
        assert np.array_equal(before[..., 1:], after[..., 1:])
        lit = before[..., 0] > 20
        assert np.median(after[..., 0][lit] / before[..., 0][lit]) == pytest.approx(0.5, abs=0.03)
        scene = (0.3, 0.3, 0.3)
        made.reset(0)
        assert np.array_equal(made.render(), before)


@pytest.mark.parametrize("factor", ["texture", "distractor"])
def test_what_is_beside_the_task_changes_the_picture_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, factor: Factor
) -> None:
    def step(made: Environment) -> np.ndarray[Any, Any]:
        made.reset(3)
        return made.step(np.array([0.5, 0.5, -1, 0])).observation

    with environment() as own, environment(vary=(factor,)) as other:
        assert np.array_equal(step(own), step(other))
        plain, changed = own.render(), other.render()
        far = np.abs(plain.astype(int) - changed).max(2) > 30
        assert 0.005 < far.mean() < 0.9
        # The middle of the picture belongs to the robot and what it works on.
        if factor == "distractor":
            assert not far[SIZE * 3 // 8 : SIZE * 5 // 8, SIZE * 3 // 8 : SIZE * 5 // 8].any()
        scene = other.scene
        monkeypatch.setattr(simulation, "draw_scene", lambda *_: Scene(own.own_view))
        step(other)
        assert np.array_equal(other.render(), plain)
        monkeypatch.setattr(simulation, "draw_scene", lambda *_: scene)
        step(other)
        assert np.array_equal(other.render(), changed)


def test_quality_costs_smooth_edges_and_shadows_only() -> None:
    with environment() as fast, environment(quality="full") as full:
        fast.reset(0)
        full.reset(0)
        a, b = fast.render(), full.render()
        assert a.shape == b.shape == (SIZE, SIZE, 3)
        assert a.dtype == np.uint8
        assert 0 < np.abs(a.astype(int) - b).mean() < 25


@pytest.mark.parametrize("action", [[0, 0, np.nan, 0], [0, 0, 0], [[0, 0, 0, 0]]])
def test_an_action_that_is_none_is_refused(action: list[Any]) -> None:
    with environment() as made:
        made.reset(0)
        with pytest.raises(
            SimulationError, match=r"drawer-open-v3 was given.*4 finite numbers: dx, dy, dz, gripper_effort"
        ):
            made.step(np.array(action))


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Is it 'drawer-open'\?"):
        environment("drawer-opne")


def test_opengl_that_does_not_work_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    with environment() as made:
        made.reset(0)
        monkeypatch.setattr(simulation.load_mujoco(), "Renderer", fail)
        with pytest.raises(ConfigError, match=r"eglQueryString.*apt-get install"):
            made.render()


def test_what_is_seen_belongs_to_what_is_done() -> None:
    with environment() as made:
        trial = attempt(made, 3, 0.1, 5)
        assert trial is not None
        assert len(trial.actions) == trial.success_step + 5
        assert not np.array_equal(trial.actions, trial.meant)
        pictures = look(made, 3, trial.actions)
        assert made.success == trial.at_end
        for step in (0, 40):
            made.reset(3)
            for action in trial.actions[:step]:
                made.step(action)
            assert np.array_equal(made.observation, trial.observations[step])
            assert np.array_equal(made.render(), pictures[step])


def test_an_expert_without_control_fails() -> None:
    with environment("assembly") as made:
        made.expert = lambda: lambda _: np.zeros(4, np.float32)  # type: ignore[method-assign]
        assert attempt(made, 3, 0.0, 5) is None


def collect(out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.cortexbench", "collect", "--tasks=button-press,reach", f"--out={out}",
        "--episodes=2", "--size=32", "--vary=camera", "--after_success=2", "--workers=2", *options,
    ]  # fmt: skip


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def processes_that_mention(text: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_recorded_demonstrations_repeat_in_the_simulator_itself(tmp_path: Path) -> None:
    said = run(collect(tmp_path, "--noise=0.1"))
    assert [line.split()[:2] for line in said.splitlines()[2:4]] == [["button-press-v3", "2"], ["reach-v3", "2"]]
    folder = LeRobotFolder(tmp_path)
    actions, states = folder.column("action"), folder.column(SCENE_STATE)
    assert len({episode.record["azimuth_deg"] for episode in folder.episodes}) == 4
    for episode in folder.episodes:
        made = upstream(episode.tasks[0], episode.record["seed"])
        observation, success = made.reset()[0], []
        # As before a recording, to see where things are. The solver begins its search there: without this, a thing
        # that is pushed in reach-v3 comes to lie up to a millimetre elsewhere.
        simulation.load_mujoco().mj_forward(made.model, made.data)
        for place in range(episode.start, episode.start + episode.length):
            assert np.abs(observation - states[place]).max() < 1e-6
            observation, *_, more = made.step(actions[place])
            success.append(more["success"])
        assert success.index(1) + 1 == episode.record["success_step"] == episode.length - 2
        assert folder.frame(episode, episode.length - 1, folder.camera()).size == (32, 32)


# The command, killed by the first of its workers that has written an episode, however fast the machine is.
KILLING = """
import multiprocessing, os, signal, sys, time
from benchmarks.cortexbench.__main__ import main
from theia.trajectories.lerobot_writer import LeRobotWriter

write = LeRobotWriter.write

def write_and_kill(*arguments):
    write(*arguments)
    os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
    time.sleep(600)  # a worker ends with its parent

LeRobotWriter.write = write_and_kill
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_recording_goes_on_after_a_kill_and_with_more_episodes(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = tmp_path / "killing.py"
    script.write_text(KILLING)
    # So that the workers, whose command lines are multiprocessing's own, can be recognised.
    paths = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": paths, "RECORDING": str(killed)}
    process = subprocess.Popen([sys.executable, str(script), *collect(killed)[3:]], env=environ)
    end = time.monotonic() + 120
    assert process.wait(120) == -signal.SIGKILL
    while processes_that_mention(str(killed)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_that_mention(str(killed))
    assert len(list((killed / "meta/episodes").glob("*/*.parquet"))) in (1, 2)  # each worker may have finished one
    run(collect(killed))
    run(collect(whole))
    assert re.search(r"recorded now: 0, .* has 4 in all", run(collect(whole)))
    ours, theirs = LeRobotFolder(killed), LeRobotFolder(whole)
    assert ours.tasks == theirs.tasks
    for key in ("action", SCENE_STATE):
        assert np.array_equal(ours.column(key), theirs.column(key))
    run(collect(whole, "--episodes=3"))
    more = LeRobotFolder(whole)
    assert len(more.episodes) == 6
    assert np.array_equal(more.column("action")[: ours.frame_count], ours.column("action"))


@pytest.mark.slow
def test_every_task_can_be_looked_at() -> None:
    simulation.load_mujoco()
    from metaworld.env_dict import ENV_CLS_MAP

    assert set(ENV_CLS_MAP) == {task.name for task in TASKS.values() if task.simulator == "metaworld"}
    for task in ENV_CLS_MAP:
        with open_environment(task, 32) as made:
            made.step(made.expert()(made.reset(0)))
            assert made.render().std() > 10, task
            assert round(1 / made._environment.dt) == made.task.frames_per_s == 80, task
