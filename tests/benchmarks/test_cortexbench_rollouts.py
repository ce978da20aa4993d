"""Rollouts in a stand-in for the simulators, whose scene is a number that actions move towards its goal."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.cortexbench import simulators
from benchmarks.cortexbench.encoders import Eyes, TaskRecording
from benchmarks.cortexbench.rollouts import Film, Pilot, roll_out
from benchmarks.cortexbench.simulation import SimulationError
from benchmarks.cortexbench.simulators import Command, Course, Moment
from theia.models.backbone import StudentTokens
from theia.policies.action_heads import MLPHead
from theia.trajectories.lerobot import LeRobotFolder
from theia.trajectories.video import load_av

CPU = torch.device("cpu")
COURSE = Course("task", tuple(range(7)), (), 1.0, 64, "fast", 32, 12, None)


class StandIn:
    """Environments whose task is fulfilled from a step on that their seed decides, and for three steps."""

    def __init__(self) -> None:
        self.groups = [[0, 1], [2, 3]]
        self.said: list[tuple[int, Moment]] = []
        self.seeds: dict[int, int] = {}
        self.steps: dict[int, int] = {}
        self.actions: dict[int, list[float]] = {}

    def send(self, command: Command) -> None:
        beginning = None
        if command.seed is not None:
            self.seeds[command.slot], self.steps[command.slot] = command.seed, 0
            beginning = {"seed": command.seed}
        else:
            self.steps[command.slot] += 1
            self.actions.setdefault(self.seeds[command.slot], []).append(float(command.action[0]))
        seed, step = self.seeds[command.slot], self.steps[command.slot]
        observation = np.full(39, float(seed))
        observation[5] = step
        picture = np.full((3, 32, 32), 10 * seed + step, np.uint8) if command.look else None
        self.said.append((command.slot, Moment(observation, seed < step <= seed + 3, picture, beginning)))

    def receive(self, slot: int) -> Moment:
        place = next(number for number, (of, _) in enumerate(self.said) if of == slot)
        return self.said.pop(place)[1]


def mean_colour(images: torch.Tensor) -> StudentTokens:
    colours = images.float().mean((2, 3))[:, None]
    return StudentTokens(None, colours[:, :0], colours, (1, 1))


SEES_NOTHING = Eyes("blind", "blind", None, 0, (1, 1), "", (), 4)
SEES_COLOUR = Eyes("colour", "colour", mean_colour, 3, (1, 1), "", (), 4)


def test_a_simulator_s_own_error_is_told_and_the_process_lives_on(monkeypatch):
    class Pipe:
        def __init__(self):
            self.commands = [Command(0, False, seed=1), Command(0, False, seed=2)]
            self.said = []

        def recv(self):
            if not self.commands:
                raise EOFError
            return self.commands.pop(0)

        def send(self, said):
            self.said.append(said)

    def unstable(*_):
        raise FloatingPointError("QACC is not finite")

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # here, Ctrl-C stays as it is
    monkeypatch.setattr(simulators, "open_environment", unstable)
    pipe = Pipe()
    simulators._simulate(pipe, COURSE)
    assert [type(said) for said in pipe.said] == [SimulationError, SimulationError]
    assert "task cannot be simulated (FloatingPointError: QACC is not finite)" in str(pipe.said[0])


class Echo(torch.nn.Module):
    """A policy whose action is what it was shown of the three frames."""

    def __init__(self) -> None:
        super().__init__()
        self.chunk, self.options = 1, {"actions": 4}
        self.shown: list[list[float]] = []

    def look(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return patches.transpose(1, 2).reshape(len(patches), -1, *grid)

    def forward(self, frames: torch.Tensor | None, known: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if frames is not None:
            self.shown += frames[:, :, 0, 0, 0].tolist()
        return known[:, None, :1].expand(-1, 1, 4)


def test_every_initial_state_is_tried_once_and_success_is_that_of_the_last_step():
    simulators = StandIn()
    found = roll_out(simulators, Pilot(SEES_NOTHING, Echo(), CPU), COURSE)
    assert [one.seed for one in found] == list(range(7))
    assert [one.beginning for one in found] == [{"seed": seed} for seed in range(7)]
    assert all(one.steps == 12 for one in found)
    assert [one.first_success for one in found] == [seed + 1 for seed in range(7)]
    assert [one.success for one in found] == [False] * 7  # none lasts until step 12
    ends_in_success = roll_out(StandIn(), Pilot(SEES_NOTHING, Echo(), CPU), replace(COURSE, horizon=5))
    assert [one.success for one in ends_in_success] == [seed < 5 <= seed + 3 for seed in range(7)]
    assert simulators.actions == {seed: [float(seed)] * 12 for seed in range(7)}  # each is given its own action


def test_a_rollout_may_end_once_the_task_stays_fulfilled():
    found = roll_out(StandIn(), Pilot(SEES_NOTHING, Echo(), CPU), replace(COURSE, hold=3))
    assert [one.steps for one in found] == [seed + 3 for seed in range(7)]
    assert all(one.success for one in found)


class Earning(StandIn):
    """Earns its seed with every step, and is over after four steps if the seed is odd."""

    def receive(self, slot: int) -> Moment:
        moment = super().receive(slot)
        step, seed = moment.observation[5], moment.observation[0]
        return moment._replace(reward=seed if step else 0.0, over=bool(seed % 2) and step >= 4)


def test_rewards_are_added_up_and_a_rollout_ends_where_it_cannot_go_on():
    found = roll_out(Earning(), Pilot(SEES_NOTHING, Echo(), CPU), COURSE)
    assert [one.steps for one in found] == [4 if seed % 2 else 12 for seed in range(7)]
    assert [one.rewards for one in found] == [seed * (4 if seed % 2 else 12) for seed in range(7)]
    assert [one.fulfilled for one in found] == [min(3, max(0, one.steps - one.seed)) for one in found]


def test_a_robot_that_does_not_know_itself_gives_a_blind_policy_nothing():
    observation = np.arange(78.0).reshape(2, 39)
    assert replace(SEES_NOTHING, proprioception=0).known(observation).shape == (2, 0)
    assert replace(SEES_COLOUR, proprioception=0).known(observation).shape == (2, 0)
    assert replace(SEES_COLOUR, proprioception=30).known(observation).shape == (2, 30)
    policy = MLPHead(3, (1, 1), 0, 6).eval()
    frames = torch.randn(2, 3, 3, 1, 1)
    assert policy(frames, torch.zeros(2, 0)).shape == (2, 1, 6)


def test_a_policy_is_shown_the_first_frame_three_times_and_then_the_last_three():
    policy = Echo()
    course = replace(COURSE, seeds=(1, 2), horizon=4)
    roll_out(StandIn(), Pilot(SEES_COLOUR, policy, CPU), course)
    for seed in (1, 2):
        own = [frames for frames in policy.shown if frames[2] // 10 == seed]
        at = [10 * seed + step for step in range(4)]
        assert own == [[at[0]] * 3, [at[0], at[0], at[1]], at[:3], at[1:4]]


def test_the_state_knows_everything_and_other_policies_the_hand_alone():
    observation = np.arange(78.0).reshape(2, 39)
    np.testing.assert_array_equal(replace(SEES_NOTHING, name="state").known(observation), observation)
    np.testing.assert_array_equal(SEES_COLOUR.known(observation), observation[:, :4])


def test_a_video_shows_what_the_encoder_is_given(tmp_path: Path):
    pytest.importorskip("av")
    policy = MLPHead(0, (1, 1), 4, 4)
    with Film(lambda number: tmp_path / f"{number}.mp4", 20) as film:
        roll_out(StandIn(), Pilot(SEES_NOTHING, policy, CPU), replace(COURSE, seeds=(3, 12)), film.watch)
    for number, seed in enumerate((3, 12)):
        with load_av().open(str(tmp_path / f"{number}.mp4")) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(frames) == 12
        assert [frame.mean() for frame in frames] == pytest.approx([10 * seed + step for step in range(12)], abs=2)


def test_an_interrupted_video_leaves_nothing(tmp_path: Path):
    pytest.importorskip("av")
    film = Film(lambda number: tmp_path / f"{number}.mp4", 20)
    film.watch(0, np.zeros((3, 32, 32), np.uint8), None)
    film.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not list(tmp_path.iterdir())


def test_the_demonstrations_of_one_task_are_numbered_by_themselves(tmp_path: Path):
    pytest.importorskip("pyarrow")
    from theia.trajectories.lerobot_writer import LeRobotWriter

    writer = LeRobotWriter(tmp_path, 20, {"action": ["x"]}, {"top": (16, 16)}, ["a", "b"], "image")
    for number, (task, length) in enumerate([("a", 3), ("b", 2), ("a", 4), ("b", 5), ("a", 2)]):
        pictures = np.full((length, 16, 16, 3), 10 * number, np.uint8)
        values = {"action": np.full((length, 1), number, np.float32)}
        writer.write(number, task, values, {"top": pictures}, {"seed": 7 + number})
    writer.finish()
    folder = LeRobotFolder(tmp_path)
    part = TaskRecording(folder, "a", 2)
    assert [(one.index, one.start, one.length) for one in part.episodes] == [(0, 0, 3), (1, 3, 4)]
    assert part.frame_count == 7
    assert part.seeds == {7, 9}
    assert folder.column("action")[part.rows].ravel().tolist() == [0] * 3 + [2] * 4
    pictures = list(part.frames(part.episodes[1], "top", range(4)))
    assert [np.asarray(picture).mean() for picture in pictures] == [20] * 4
