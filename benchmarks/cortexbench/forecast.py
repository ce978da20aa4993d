"""How long a run will take at most, from one step of everything, measured beforehand."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cortexbench.encoders import Eyes, TaskRecording
from benchmarks.cortexbench.learning import make_head, pictures_of, tuning_of
from benchmarks.cortexbench.run_plan import RunPlan
from benchmarks.cortexbench.simulators import Command, Simulators
from benchmarks.cortexbench.tasks import TASKS
from theia.policies.cloning import RECIPES, Training
from theia.policies.demonstrated import Demonstrations, plain_tokens, updates_per_epoch
from theia.policies.fusion import HISTORY
from theia.probing.datasets import IMAGE_SIZE

_TRIED_STEPS = 12
_TRIED_OF_BATCH = 4  # steps of the demonstrations, where the encoder is trained too


@dataclass(frozen=True)
class Left:
    """What is left to do for one encoder.

    Attributes:
        policies: Number of policies to train, and to test along the way.
        tests: Number of further tests of finished policies.
    """

    policies: int
    tests: int


def forecast(
    plan: RunPlan, left: Mapping[str, Left], eyes: Sequence[Eyes], task: str, recording: TaskRecording,
    simulators: Simulators, workers: int, device: torch.device,
) -> str:  # fmt: skip
    """Measures one step of everything, and says how long the rest will take at most.

    Args:
        plan: The run.
        left: What is left to do, by the label of the encoder.
        eyes: What they are given.
        task: Full name of the first task.
        recording: Its demonstrations.
        simulators: Its simulators.
        workers: Number of simulator processes.
        device: Device of encoders and policies.
    """
    preset, tasks, actions = plan.preset, len(plan.tasks), plan.data.actions(task)
    looking, blind = (_seconds_per_step(simulators, actions, look) for look in (True, False))
    lines, total = [], 0.0
    for one in eyes:
        encoding, deciding, fitting = _seconds(plan, one, task, recording, workers, device)
        simulating = (looking if one.tokens_of is not None else blind) / min(workers, preset.rollouts)
        epochs, evaluations = plan.schedule(recording.frame_count)
        policies, tests = left[one.label].policies, left[one.label].tests
        steps = preset.rollouts * preset.steps(TASKS[task]) * (policies * len(evaluations) + tests)
        updates = epochs * updates_per_epoch(recording.frame_count, RECIPES[plan.learner.head].batch_size)
        execute = plan.learner.execute or plan.learner.predicted
        # Of the frames between two decisions, no more than three are encoded.
        a_step = simulating + encoding * min(HISTORY, execute) / execute + deciding
        seconds = policies * updates * fitting + steps * a_step
        seconds += tasks * recording.frame_count * encoding if policies else 0
        total += seconds
        lines.append(
            f"  {one.label}: {policies} policies, each with {updates} updates of {1000 * fitting:.0f} ms, and at most "
            f"{steps:,} steps of {1000 * a_step:.0f} ms in all: {seconds / 60:.0f} min"
        )
    return f"At most about {total / 60:.0f} min, as measured now on this machine:\n" + "\n".join(lines)


def _seconds(
    plan: RunPlan, eyes: Eyes, task: str, recording: TaskRecording, workers: int, device: torch.device
) -> tuple[float, float, float]:
    """Time of one frame through the encoder, of one decision, and of one update."""
    encoding, tokens, look = 0.0, None, eyes.tokens_of
    count = RECIPES[plan.learner.head].batch_size
    if look is not None:
        rows, columns = (min(side, plan.preset.most_rows or side) for side in eyes.grid)
        blank = torch.zeros((workers, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
        encoding = _time(lambda: look(blank)) / workers
        made_up = np.random.default_rng(0).normal(size=(count, rows * columns, eyes.channels))
        tokens = plain_tokens(made_up.astype(np.float16), (rows, columns))
    known = eyes.known(np.zeros((count, TASKS[task].observations)))
    actions, tuning = np.zeros((count, plan.data.actions(task)), np.float32), tuning_of(plan, eyes)
    recorded = pictures_of(recording)

    def pictures(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return recorded(np.minimum(rows, recording.frame_count - 1))

    # Apart, a step has three pictures of its own, as it nearly has in a batch of steps in any order.
    made_up_data = Demonstrations.of(tokens, known, actions, [count], pictures if tuning is not None else None)
    training = Training(lambda: make_head(plan, eyes, made_up_data), made_up_data, 0, None, device, tuning=tuning)
    tried = np.arange(count) if tuning is None else np.arange(2, count, count // _TRIED_OF_BATCH)
    fitting = _time(lambda: training.step(tried)) * count / len(tried)
    head = training.head.eval()
    with torch.inference_mode():
        frames, seen = made_up_data.batch(head, np.arange(min(workers, count)), device)
        deciding = _time(lambda: head(frames, seen)) / min(workers, count)
    return encoding, deciding / (plan.learner.execute or head.chunk), fitting


def _seconds_per_step(simulators: Simulators, actions: int, look: bool) -> float:
    slot = simulators.groups[0][0]
    action = np.zeros(actions, np.float32)
    for command in (Command(slot, look, seed=0), Command(slot, look, action=action)):
        simulators.send(command)
        simulators.receive(slot)
    started = time.perf_counter()
    for _ in range(_TRIED_STEPS):
        simulators.send(Command(slot, look, action=action))
        simulators.receive(slot)
    return (time.perf_counter() - started) / _TRIED_STEPS


def _time(work: Callable[[], Any]) -> float:
    work()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
