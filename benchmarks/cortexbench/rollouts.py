"""Rollouts: policies act in several simulators at once, counted and filmed."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.cortexbench.encoders import Eyes
from benchmarks.cortexbench.simulators import Command, Course, Moment, Simulators
from theia.policies.acting import Actor, Memory
from theia.policies.action_heads import Head
from theia.probing.datasets import IMAGE_SIZE
from theia.trajectories.video import load_av
from theia.utils.files import replacing
from theia.utils.pictures import ColourBasis, colour_basis, pca_colours

# Called with the number of a rollout, the picture, and the maps that the policy keeps of it, shape (channels, H, W).
Watch = Callable[[int, NDArray[np.uint8], NDArray[np.float32] | None], None]


@dataclass
class Rollout:
    """How one rollout went.

    Attributes:
        seed: Its seed.
        beginning: Positions of all joints and objects, camera and light.
        steps: Number of its steps.
        first_success: Number of steps until the task was first fulfilled; ``None`` if it never was.
        success: Whether the task was fulfilled after the last step.
        fulfilled: Number of steps after which it was.
        rewards: Sum of the rewards.
    """

    seed: int
    beginning: dict[str, Any]
    steps: int = 0
    first_success: int | None = None
    success: bool = False
    fulfilled: int = 0
    rewards: float = 0.0
    held: int = field(default=0, repr=False)

    def add(self, success: bool, reward: float = 0.0) -> None:
        """Counts a step."""
        self.steps += 1
        self.fulfilled += success
        self.rewards += reward
        self.success = success
        self.held = self.held + 1 if success else 0
        if success and self.first_success is None:
            self.first_success = self.steps


class Pilot:
    """An encoder and a policy head that act in several environments.

    Args:
        eyes: What the policy is given.
        head: The head.
        device: Device of both.
        execute: Number of the predicted actions that are carried out before the next decision; by default, all.
    """

    def __init__(self, eyes: Eyes, head: Head, device: torch.device, execute: int | None = None) -> None:
        self.eyes, self._actor = eyes, Actor(head, eyes.tokens_of, device, execute)
        self._memories: dict[int, Memory] = {}

    def begin(self, slot: int) -> None:
        """Forgets the last episode of an environment."""
        self._memories[slot] = Memory()

    def act(self, moments: dict[int, Moment]) -> NDArray[np.float32]:
        """Actions for the moments of some environments, shape ``(B, A)``."""
        known = self.eyes.known(np.stack([moment.observation for moment in moments.values()]))
        pictures: torch.Tensor | None = None
        if self.eyes.tokens_of is not None:
            pictures = torch.from_numpy(np.stack([cast(Any, moment.picture) for moment in moments.values()]))
        memories = [self._memories[slot] for slot in moments]
        return self._actor.act(memories, pictures, torch.from_numpy(known)).numpy()

    def last_maps(self, slot: int) -> NDArray[np.float32] | None:
        """What the policy keeps of the newest frame that it encoded of an environment, shape ``(channels, H, W)``."""
        maps = self._memories[slot].last_maps
        return None if maps is None else maps.cpu().numpy()


def roll_out(simulators: Simulators, pilot: Pilot, course: Course, watch: Watch | None = None) -> list[Rollout]:
    """Lets a policy act, once from every initial state.

    Which environments are encoded together depends on nothing but how the rollouts go, so that a rollout can be
    repeated.

    Args:
        simulators: Simulators of the task.
        pilot: Encoder and policy.
        course: What the policy is tested on.
        watch: Called with every picture, even if the policy sees none.

    Raises:
        TheiaError: If a simulation fails.
    """
    waiting = deque(enumerate(course.seeds))
    running: dict[int, tuple[int, Rollout]] = {}
    done: dict[int, Rollout] = {}
    look = pilot.eyes.tokens_of is not None or watch is not None

    def begin(slot: int) -> bool:
        if not waiting:
            return False
        number, seed = waiting.popleft()
        running[slot] = (number, Rollout(seed, {}))
        pilot.begin(slot)
        simulators.send(Command(slot, look, seed=seed))
        return True

    groups = [[slot for slot in group if begin(slot)] for group in simulators.groups]
    with _torch_on_one_thread():
        while any(groups):
            groups = [_turn(group, simulators, pilot, course, running, done, begin, watch) for group in groups]
    return [done[number] for number in range(len(course.seeds))]


def _turn(
    group: Sequence[int],
    simulators: Simulators,
    pilot: Pilot,
    course: Course,
    running: dict[int, tuple[int, Rollout]],
    done: dict[int, Rollout],
    begin: Callable[[int], bool],
    watch: Watch | None,
) -> list[int]:
    """Takes what the environments of a group say, and moves them; gives those that go on."""
    acting: dict[int, Moment] = {}
    left = []
    for slot in group:
        number, rollout = running[slot]
        moment = simulators.receive(slot)
        if moment.beginning is not None:
            rollout.beginning = moment.beginning
        else:
            rollout.add(moment.success, moment.reward)
        held = course.hold is not None and rollout.held >= course.hold
        if rollout.steps < course.horizon and not moment.over and not held:
            acting[slot] = moment
        else:
            done[number] = rollout
            if not begin(slot):
                continue
        left.append(slot)
    if acting:
        for (slot, moment), action in zip(acting.items(), pilot.act(acting), strict=True):
            simulators.send(Command(slot, moment.picture is not None, action=action))
            if watch is not None and moment.picture is not None:
                watch(running[slot][0], moment.picture, pilot.last_maps(slot))
    return left


class Film:
    """Videos of rollouts: left, the picture that the encoder is given; right, the policy's maps of it in three colours.

    Colours are the first principal components of the maps of the first frame, the same for the whole video.

    Args:
        path_of: Path of the video of a rollout, by its number.
        frames_per_s: Frame rate.
    """

    def __init__(self, path_of: Callable[[int], Path], frames_per_s: int) -> None:
        self._path_of, self._rate = path_of, frames_per_s
        self._files = ExitStack()
        self._videos: dict[int, tuple[Any, Any]] = {}  # container and stream
        self._bases: dict[int, ColourBasis] = {}

    def __enter__(self) -> "Film":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            for container, stream in self._videos.values():
                container.mux(stream.encode())
        self._files.__exit__(kind, error, trace)

    def watch(self, number: int, picture: NDArray[np.uint8], maps: NDArray[np.float32] | None) -> None:
        """Adds a frame to the video of a rollout.

        Raises:
            ConfigError: If PyAV is not installed.
            FileError: If the disk is full.
        """
        shown = [picture.transpose(1, 2, 0)]
        if maps is not None and maps.shape[1] * maps.shape[2] > 1:
            tokens = maps.reshape(len(maps), -1).T
            if number not in self._bases:
                self._bases[number] = colour_basis(tokens)
            small = Image.fromarray(pca_colours(tokens, (maps.shape[1], maps.shape[2]), self._bases[number]))
            shown.append(np.asarray(small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)))
        frame = np.concatenate(shown, 1)
        if number not in self._videos:
            self._videos[number] = self._open(number, frame.shape[0], frame.shape[1])
        container, stream = self._videos[number]
        container.mux(stream.encode(load_av().VideoFrame.from_ndarray(frame, format="rgb24")))

    def _open(self, number: int, height: int, width: int) -> tuple[Any, Any]:
        temporary = self._files.enter_context(replacing(self._path_of(number)))
        container = self._files.enter_context(load_av().open(str(temporary), "w", format="mp4"))
        stream = container.add_stream("libx264", rate=Fraction(self._rate), options={"crf": "18"})
        stream.pix_fmt, stream.height, stream.width = "yuv420p", height, width
        return container, stream


@contextmanager
def _torch_on_one_thread() -> Iterator[None]:
    """More threads would take the cores from the simulators, and wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
