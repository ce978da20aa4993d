"""DM Control and Adroit themselves, in an environment that has them: pip install '.[dev,simulation]'."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cortexbench import __main__ as command
from benchmarks.cortexbench.demonstrations import SCENE_STATE, attempt
from benchmarks.cortexbench.fixed_camera import view_of_camera
from benchmarks.cortexbench.planning import PLANNING, Planner
from benchmarks.cortexbench.scenes import View
from benchmarks.cortexbench.simulation import load_mujoco, open_environment
from benchmarks.cortexbench.tasks import GROUPS, TASKS
from theia.errors import ConfigError
from theia.trajectories.lerobot import LeRobotFolder

SIZE = 64
DMC, ADROIT = GROUPS["dmc"], GROUPS["adroit"]
needs_suite = pytest.mark.skipif(
    importlib.util.find_spec("dm_control") is None,
    reason="dm-control is not installed: pip install 'theia[simulation]'",
)
needs_adroit = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None,
    reason="gymnasium-robotics is not installed: pip install 'theia[simulation]'",
)


def suite_s_own(task: str, seed: int) -> Any:
    """The task as the suite gives it."""
    load_mujoco()
    from dm_control import suite

    domain, _, name = task.partition("-")
    return suite.load(domain, name, task_kwargs={"random": seed})


def adroit_s_own(task: str) -> Any:
    """The task as gymnasium gives it."""
    load_mujoco()
    import gymnasium
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    return gymnasium.make(f"AdroitHand{task.capitalize()}-v1")


def flat(observation: Any) -> Any:
    return np.concatenate([np.ravel(part) for part in observation.values()])


@needs_suite
@pytest.mark.parametrize("task", DMC)
def test_observations_and_rewards_are_those_of_the_suite(task):
    rng = np.random.default_rng(0)
    with open_environment(task, SIZE) as made:
        made.reset(9)
        made.step(rng.uniform(-1, 1, len(made.task.actions)))
        for seed in (3, 4):
            truth = suite_s_own(task, seed)
            assert np.array_equal(made.reset(seed), flat(truth.reset().observation))
            assert made.observation.shape == (made.task.observations,)
            for action in rng.uniform(-1, 1, (30, len(made.task.actions))).astype(np.float32):
                step, expected = made.step(action), truth.step(action)
                assert np.array_equal(step.observation, flat(expected.observation))
                assert (step.reward, step.over) == (expected.reward, False)
        assert round(1 / truth.control_timestep()) == made.task.frames_per_s
        motors = [truth.physics.model.id2name(number, "actuator") for number in range(truth.physics.model.nu)]
        assert made.task.actions == tuple(f"{motor}_effort" for motor in motors)


@needs_suite
@pytest.mark.parametrize("task", DMC)
def test_the_picture_is_that_of_the_suite_s_first_camera(task):
    with open_environment(task, SIZE, "full") as made:
        truth = suite_s_own(task, 3)
        made.reset(3)
        truth.reset()
        for action in np.random.default_rng(0).uniform(-1, 1, (10, len(made.task.actions))):
            expected = truth.physics.render(SIZE, SIZE, camera_id=0).astype(int)
            assert expected.std() > 5
            assert np.abs(made.render() - expected).mean() < 1
            made.step(action)
            truth.step(action.astype(np.float32))


@needs_suite
def test_an_episode_does_not_begin_anew_by_itself():
    with open_environment("reacher-easy", SIZE) as made:
        made.reset(0)
        for _ in range(1002):
            made.step(np.ones(2))
        assert made._environment.physics.time() == pytest.approx(1002 * 0.02)


@needs_adroit
@pytest.mark.parametrize("task", ADROIT)
def test_observations_and_success_are_those_of_gymnasium(task):
    truth = adroit_s_own(task)
    with open_environment(task, SIZE) as made:
        made.reset(9)
        for seed in (3, 4):
            expected, _ = truth.reset(seed=seed)
            known = made.task.proprioception
            assert np.array_equal(made.reset(seed), expected)
            assert np.array_equal(made.observation[:known], truth.unwrapped.data.qpos[:known])
            for _ in range(30):
                action = truth.action_space.sample()
                expected, reward, _, _, more = truth.step(action)
                step = made.step(action)
                assert np.array_equal(step.observation, expected)
                assert (step.reward, step.success) == (reward, more["success"])
        assert round(1 / truth.unwrapped.dt) == made.task.frames_per_s
        model = truth.unwrapped.model
        assert made.task.actions == tuple(model.actuator(number).name for number in range(model.nu))
        assert made.task.states == tuple(model.joint(number).name for number in range(model.njnt - 6))
    truth.close()


@needs_adroit
def test_success_is_where_gymnasium_sees_it():
    """The ball is put where it belongs."""
    with open_environment("relocate", SIZE) as made:
        made.reset(3)
        inner = made._environment
        target = inner.data.site_xpos[inner.target_obj_site_id] - inner.data.body("Object").xpos
        inner.data.qpos[-6:-3] += target
        assert made.step(np.zeros(30)).success
        made.reset(3)
        assert not made.step(np.zeros(30)).success


@needs_adroit
def test_an_episode_is_over_once_the_pen_is_dropped():
    with open_environment("pen", SIZE) as made:
        made.reset(3)
        assert not made.step(np.zeros(24)).over
        pen = made._environment.data.body("Object")
        axes = pen.xmat.reshape(3, 3)  # of the joints
        made._environment.data.qpos[-6:-3] += axes.T @ (0, 0, -0.3)
        assert made.step(np.zeros(24)).over
        assert pen.xpos[2] < 0.075


@needs_adroit
@pytest.mark.parametrize("task", ADROIT)
def test_the_picture_is_that_of_the_paper_s_camera(task):
    mujoco = load_mujoco()
    with open_environment(task, SIZE, "full") as made:
        made.reset(3)
        picture = made.render()
        with mujoco.Renderer(made._environment.model, SIZE, SIZE) as renderer:
            renderer.update_scene(made._environment.data, "vil_camera")
            assert np.array_equal(picture, renderer.render())
        assert picture.std() > 10


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=needs_adroit if task in ADROIT else needs_suite) for task in (*DMC, *ADROIT)],
)
def test_a_camera_at_the_place_of_the_task_s_own_sees_the_same(task):
    with open_environment(task, SIZE) as made:
        made.reset(3)
        for _ in range(10):
            made.step(np.full(len(made.task.actions), 0.5))
        own = made.render().astype(int)
        view = made.own_view
        made.scene = replace(made.scene, view=replace(view, azimuth_deg=view.azimuth_deg + 1e-6))
        assert np.abs(made.render() - own).mean() < 1
        made.scene = replace(made.scene, view=replace(view, azimuth_deg=view.azimuth_deg + 15))
        assert np.abs(made.render() - own).mean() > 2


@needs_suite
def test_camera_and_light_are_drawn_from_the_seed():
    with open_environment("walker-walk", SIZE, vary=("camera", "light")) as made:
        made.reset(3)
        first, scene = made.render(), made.scene
        made.reset(4)
        assert made.scene != scene
        assert np.abs(made.render().astype(int) - first).mean() > 2
        made.reset(3)
        assert made.scene == scene
        assert np.array_equal(made.render(), first)


def test_a_camera_is_described_by_the_point_that_it_looks_at():
    right, up, back = np.eye(3)
    down = view_of_camera((0.1, 0.2, 0.75), np.stack([right, up, back], 1), (0, 0, 0.01))
    assert (down.azimuth_deg, down.elevation_deg) == (90, -90)
    assert (down.distance_m, down.look_at_m) == pytest.approx((0.74, pytest.approx((0.1, 0.2, 0.01))))
    level = view_of_camera((0.0, -3.0, 0.7), np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), (0.5, 0, 0.6))
    assert level == View(90, 0, 3.0, (0.0, 0.0, 0.7))


@needs_suite
def test_what_an_expert_does_follows_from_the_seed_whatever_the_threads():
    actions = []
    for threads in (1, 2):
        with open_environment("cheetah-run", SIZE) as made:
            made.threads = threads
            observation, expert = made.reset(3), made.expert()
            steps = []
            for _ in range(6):
                steps.append(expert(observation))
                observation = made.step(steps[-1]).observation
            actions.append(np.array(steps))
    assert np.array_equal(actions[0], actions[1])
    assert np.abs(actions[0]).max() <= 1


@needs_suite
def test_planning_leaves_model_and_state_as_they_are():
    with open_environment("finger-spin", SIZE) as made:
        made.reset(3)
        data, model = made._data, made._model
        before = (data.time, data.qpos.copy(), data.qvel.copy(), data.ctrl.copy(), model.opt.timestep)
        made.expert()(made.observation)
        after = (data.time, data.qpos, data.qvel, data.ctrl, model.opt.timestep)
        assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


@needs_suite
def test_a_planner_finds_the_best_constant_force():
    """A cart on a rail with a reward for its speed: the greatest force at every step."""
    mujoco = load_mujoco()
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><joint name='rail' type='slide' axis='1 0 0'/><geom size='0.1'/></body></worldbody>"
        "<actuator><motor joint='rail' ctrlrange='-1 1'/></actuator></mujoco>"
    )
    data = mujoco.MjData(model)
    planning = replace(PLANNING["finger-spin"], earnings=lambda now: now.velocities[..., 0], substeps=1, every=1)
    planner = Planner(planning, model, 1, np.random.default_rng(0))
    actions = []
    for _ in range(20):
        actions.append(float(planner.act(data)[0]))
        data.ctrl[:] = actions[-1]
        mujoco.mj_step(model, data)
    assert np.mean(actions[5:]) > 0.9


@needs_suite
@pytest.mark.slow
@pytest.mark.parametrize(("task", "least"), [("reacher-easy", 95), ("finger-spin", 60), ("cheetah-run", 45)])
def test_an_expert_scores_by_the_suite_s_own_reward(task, least):
    with open_environment(task, SIZE) as made:
        made.threads = 2
        trial = attempt(made, 1, 0.0, 0)
    truth = suite_s_own(task, 1)
    truth.reset()
    rewards = [truth.step(action).reward for action in trial.actions]
    assert len(rewards) == 1000
    assert np.array_equal(trial.rewards, rewards)
    assert sum(rewards) / 10 == pytest.approx(trial.score)
    assert trial.score > least


@needs_suite
def test_a_demonstration_with_a_low_score_is_dropped(monkeypatch):
    with open_environment("reacher-easy", SIZE) as made:
        monkeypatch.setattr(type(made), "expert", lambda _: lambda _: np.zeros(2, np.float32))
        assert attempt(made, 3, 0.0, 0) is None


def test_there_is_no_expert_for_adroit(tmp_path: Path, capsys, monkeypatch):
    from benchmarks.cortexbench import collect as collecting

    monkeypatch.setattr(collecting, "check_installed", lambda *_: None)
    assert command.main(["collect", "--tasks=reacher-easy,adroit", f"--out={tmp_path / 'out'}"]) == 1
    assert "There is no expert for pen: its demonstrations are those of the paper" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_adroit
def test_the_environment_of_adroit_has_no_expert():
    with open_environment("pen", SIZE) as made, pytest.raises(ConfigError, match="There is no expert for pen"):
        made.expert()


@pytest.mark.parametrize(("task", "package"), [("walker-walk", "dm-control"), ("hammer", "MetaWorld")])
def test_a_missing_simulator_is_named_with_the_line_that_installs_it(task, package, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    missing = ("dm_control", "gymnasium_robotics", "metaworld")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else object())
    assert command.main(["collect", f"--tasks={task}", f"--out={tmp_path / 'out'}"]) == 1
    monkeypatch.setattr(importlib.util, "find_spec", found)
    said = capsys.readouterr().err
    assert f"{package} is not installed: pip install 'theia[simulation]'" in said


@needs_suite
@pytest.mark.slow
def test_recorded_scores_repeat_in_the_suite_itself_and_policies_get_scores(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    collect = ["collect", "--tasks=reacher-easy", f"--out={data}", "--episodes=2", f"--size={SIZE}", "--vary=camera"]
    assert command.main([*collect, "--pictures=image", "--workers=2"]) == 0
    assert "reacher-easy" in capsys.readouterr().out
    folder = LeRobotFolder(data / "reacher-easy")
    actions, rewards, states = (folder.column(name) for name in ("action", "next.reward", SCENE_STATE))
    rewards = rewards.ravel()
    for episode in folder.episodes:
        truth = suite_s_own("reacher-easy", int(episode.record["seed"]))
        moment = truth.reset()
        for row in range(episode.start, episode.start + episode.length):
            assert np.abs(flat(moment.observation) - states[row]).max() < 1e-6
            moment = truth.step(actions[row])
            assert moment.reward == pytest.approx(float(rewards[row]), abs=1e-6)
        mine = rewards[episode.start : episode.start + episode.length]
        assert episode.record["score"] == pytest.approx(100 * float(mine.mean()), rel=1e-5)
    run = ["run", "--encoders", "blind", "state", "pixels", f"--data={data}", f"--out={out}", "--preset=smoke"]
    assert command.main([*run, "--workers=2"]) == 0
    said = capsys.readouterr().out
    assert "score, return / 10" in said
    assert "A score is 100 times the mean reward" in said
    assert "at any step" not in said.partition("\n\n")[0]


def test_groups_name_known_tasks():
    assert set(DMC) | set(ADROIT) <= set(TASKS)
