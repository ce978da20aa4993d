"""How many actions a policy gives in a second, as its robot calls it: pixels of a camera in, an action out."""

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.throughput.measure import Measure, Result
from theia.export.onnx import photographs
from theia.policies.policy import Policy, load_policy

CAMERA_HW = (480, 640)
_TURN_S = 2.0
_LEAST_ACTIONS = 10
_HEADERS = ("", "median", "95th percentile", "all actions")


def measure(folder: Path, turns: int, turn_s: float | None = None) -> Result:
    """Lets a policy act on photographs of a camera's size, for several turns.

    Args:
        folder: Folder of the policy.
        turns: Number of counted turns.
        turn_s: Least duration of a turn, in seconds; two by default.

    Raises:
        WeightsError: If the folder holds no policy.
    """
    policy = load_policy(folder)
    _act(policy, _LEAST_ACTIONS, 0.0)  # torch settles on its kernels in the first calls
    times = [_act(policy, _LEAST_ACTIONS, _TURN_S if turn_s is None else turn_s) for _ in range(turns)]
    every = np.concatenate(times)
    sight = policy.sight.name if policy.sight is not None else "no encoder"
    about = f"{policy.head.kind} on {Path(sight).name}, {policy.execute} of {policy.head.chunk} actions carried out"
    measures = [
        Measure("actions/s, in the mean of a turn", [len(turn) / turn.sum() for turn in times], unit=""),
        Measure("ms per action, median", [1e3 * float(np.median(turn)) for turn in times], unit="ms"),
        Measure("ms per action, 95th percentile", [1e3 * float(np.quantile(turn, 0.95)) for turn in times], unit="ms"),
    ]
    details = {"policy": about, "camera": CAMERA_HW, "seconds": every.tolist()}
    return Result(measures, details, [about, *_notes(policy)])


def table(result: Result) -> str:
    """Milliseconds and actions per second, of single actions and of all together."""
    seconds = np.asarray(result.details["seconds"])
    median, slow = np.quantile(seconds, [0.5, 0.95])
    columns = [median, slow, seconds.mean()]
    rows = [
        ["ms per action", *(f"{1e3 * value:.1f}" for value in columns)],
        ["actions/s", *(f"{1 / value:.1f}" for value in columns)],
    ]
    return "\n".join([tabulate(rows, _HEADERS, disable_numparse=True), *result.notes])


def _notes(policy: Policy) -> list[str]:
    notes = [f"From {CAMERA_HW[1]}x{CAMERA_HW[0]} pixels; waiting for camera and robot is not in it."]
    if policy.execute > 1:
        notes.append(
            f"One decision gives {policy.execute} actions: the robot waits at that one as long as the slowest actions "
            "take, and at the others only until the picture is prepared."
        )
    if policy.about.frames_per_s is not None:
        notes.append(f"Its demonstrations have {policy.about.frames_per_s:g} actions/s.")
    return notes


def _act(policy: Policy, least: int, seconds: float) -> NDArray[np.float64]:
    """Seconds of each action of one episode. The first one, which begins the memory, is left out."""
    images = photographs(*CAMERA_HW)
    state = np.zeros(policy.state_size, np.float32) if policy.state_size else None
    policy.reset()
    times: list[float] = []
    begin = time.perf_counter()
    # Whole chunks, so that each turn has as many decisions for its actions as the others.
    while len(times) < least or time.perf_counter() - begin < seconds or (len(times) - 1) % policy.execute:
        image = images[len(times) % len(images)] if policy.sight is not None else None
        started = time.perf_counter()
        policy.act(image, state)
        times.append(time.perf_counter() - started)
    return np.array(times[1:])
