"""Records experts' demonstrations of many tasks in several processes, whole after any kill."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cortexbench.demonstrations import MOST_EPISODES, Plan, demonstrate
from benchmarks.cortexbench.recordings import check_options, keep_options
from benchmarks.cortexbench.scenes import check_factors
from benchmarks.cortexbench.simulation import (
    DISTRIBUTIONS,
    Environment,
    Quality,
    SimulationError,
    check_installed,
    find_opengl,
    open_environment,
)
from benchmarks.cortexbench.tasks import NO_EXPERT, TASKS, check_fit, find_tasks, folders_of
from theia.errors import ConfigError
from theia.trajectories.lerobot import LeRobotFolder
from theia.utils.arguments import MOST_PROCESSES, check_number, comma_list
from theia.utils.device import core_count
from theia.utils.files import alone, check_folder
from theia.utils.provenance import installed

_MOST_PIXELS = 2048
_MOST_SEED = 2**31
_MOST_AFTER_SUCCESS = 500

# For the forecast: steps until success, in the middle over MetaWorld's tasks, and the number of steps that are tried.
_TYPICAL_STEPS = 78
_FORECAST_STEPS = 10
_BESIDES = {"metaworld": ("gymnasium", "numpy"), "dmc": ("numpy",), "adroit": ("gymnasium", "numpy")}

NOT_COMPARABLE = (
    "These demonstrations are by other experts, on other physics, than those of the paper: success that is reached "
    "with them must not be compared with published figures."
)


class TaskSummary(NamedTuple):
    """What was recorded of one task.

    Attributes:
        task: Name of the task.
        episodes: Number of demonstrations.
        attempts: Number of times that the expert tried.
        at_end: Number of demonstrations whose last step still fulfils the task.
        steps: Number of steps of all demonstrations.
        seconds: Time of one process for moving and rendering.
        scores: Score of each demonstration, between 0 and 100; empty for a task with success.
    """

    task: str
    episodes: int
    attempts: int
    at_end: int
    steps: int
    seconds: float
    scores: tuple[float, ...] = ()


def collect(
    tasks: str,
    out: Path,
    episodes: int = 25,
    vary: str | None = None,
    spread: float = 1.0,
    size: int = 256,
    noise: float = 0.0,
    after_success: int = 20,
    quality: Quality = "fast",
    pictures: Literal["video", "image"] = "video",
    workers: int | None = None,
    seed: int = 0,
) -> str:
    """Records demonstrations by experts as data set folders of LeRobot: scripted in MetaWorld, planned in DM Control.

    The same command goes on with a recording that was interrupted; with more episodes, it adds to one.

    Args:
        tasks: Names of tasks, such as drawer-open,walker-walk, separated by commas; metaworld and dmc stand for
            CortexBench's five of each, small for six that tell encoders apart in short runs.
        out: Folder for the data set of MetaWorld's tasks. Tasks with other actions have data sets of their own in it,
            in folders that are named like the task.
        episodes: Number of demonstrations of each task. Those that fail are dropped, and replaced by the next seed; in
            DM Control, those whose score is far below that of the expert.
        vary: What differs between episodes: any of camera, light, texture and distractor, separated by commas. By
            default, nothing. Distractors lie on a table, which DM Control has not.
        spread: Share of the whole range in which camera and light are drawn, from 0 to 1. The wider it is, the more
            demonstrations a policy needs to act through a camera that it has not seen.
        size: Height and width of the pictures, in pixels.
        noise: Standard deviation of the noise that is added to the expert's actions, which lie between -1 and 1. What
            the expert wanted is recorded too.
        after_success: Number of steps that are recorded after the first success. 500 gives the paper's whole horizon,
            which episodes of DM Control always have.
        quality: Quality of the pictures. The fast one is without antialiasing, shadows and reflections.
        pictures: How the pictures are kept: video is lossy, image is PNG files inside the tables.
        workers: Number of processes; by default, as many as there are cores.
        seed: First seed. Each episode has its own, on which objects, goal, camera, light and noise depend.

    Returns:
        A table of what the folder holds.

    Raises:
        ConfigError: If an option is wrong, a task has no expert, a simulator is not installed, or another process works
            in the folder.
        TrajectoryError: If the folder holds another data set.
        SimulationError: If an expert fails again and again, or a process is killed.
    """
    check_number("episodes", episodes, 1, MOST_EPISODES)
    check_number("spread", spread, 0, 1)
    check_number("size", size, 16, _MOST_PIXELS)
    check_number("noise", noise, 0, 1)
    check_number("after_success", after_success, 0, _MOST_AFTER_SUCCESS)
    check_number("workers", workers, 1, MOST_PROCESSES)
    check_number("seed", seed, 0, _MOST_SEED)
    if size % 2 and pictures == "video":
        raise ConfigError(f"--size is {size}; videos need an even number. Or keep the pictures with --pictures image.")
    factors = check_factors(comma_list(vary))
    check_folder(out, "--out")
    names = find_tasks(comma_list(tasks))
    for name in names:
        if TASKS[name].simulator == "adroit":
            raise ConfigError(NO_EXPERT.format(task=name))
    check_fit(names, factors)
    check_installed(TASKS[name].simulator for name in names)
    find_opengl()
    with alone(out):
        return "\n\n".join(
            [
                *(
                    _record(
                        Plan(tuple(some), seed, factors, spread, noise, after_success, size, quality, pictures),
                        out / place, episodes, workers or core_count(),
                    )
                    for place, some in folders_of(names, out).items()
                ),
                NOT_COMPARABLE,
            ]
        )  # fmt: skip


def summarize(rows: Iterable[Mapping[str, Any]]) -> list[TaskSummary]:
    """Counts what was recorded of each task.

    Args:
        rows: Rows of the episodes in the metadata of a data set that was recorded here.

    Returns:
        One summary of each task, in the order in which they first appear.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["tasks"][0], []).append(row)
    return [
        TaskSummary(
            task,
            len(mine),
            len(mine) + sum(row["dropped"] for row in mine),
            sum(row.get("success_at_end") or 0 for row in mine),
            sum(row["length"] for row in mine),
            sum(row["seconds"] for row in mine),
            tuple(row["score"] for row in mine if row.get("score") is not None),
        )
        for task, mine in by_task.items()
    ]


def table(summaries: Sequence[TaskSummary]) -> str:
    """The summaries as text."""
    rows: list[tuple[Any, ...]] = []
    has_scores = any(one.scores for one in summaries)
    for one in summaries:
        outcome: tuple[Any, ...] = (
            f"{one.episodes / one.attempts:.0%}", one.attempts - one.episodes, f"{one.at_end / one.episodes:.0%}",
        )  # fmt: skip
        if has_scores:
            scores = one.scores or (float("nan"),)
            outcome = (f"{sum(scores) / len(scores):.1f}", f"{min(scores):.1f}", one.attempts - one.episodes)
        rows.append(
            (
                one.task, one.episodes, *outcome, f"{one.steps / one.episodes:.0f}", f"{one.seconds:.0f}",
                f"{one.steps / one.seconds:.0f}",
            )
        )  # fmt: skip
    outcome = ("score", "lowest", "dropped") if has_scores else ("success", "dropped", "at last step")
    return str(tabulate(rows, ("task", "episodes", *outcome, "steps", "seconds", "frames/s")))


def _record(plan: Plan, out: Path, episodes: int, workers: int) -> str:
    started = time.monotonic()
    simulator = TASKS[plan.tasks[0]].simulator
    settings = {**asdict(plan), "simulator": installed((DISTRIBUTIONS[simulator], "mujoco", *_BESIDES[simulator]))}
    check_options(out, settings)
    writer = plan.open_writer(out)
    keep_options(out, settings)
    jobs = [
        (task, number) for task in plan.tasks for number in range(episodes) if not writer.has(plan.index(task, number))
    ]
    processes = max(1, min(workers, len(jobs)))
    threads = max(1, workers // processes)
    if jobs:
        with open_environment(plan.tasks[0], plan.size, plan.quality, plan.vary) as environment:
            environment.threads = threads
            there = len(plan.tasks) * episodes - len(jobs)
            tqdm.write(_forecast(environment, plan, len(jobs), there, processes), file=sys.stderr)
    _work(plan, out, jobs, processes, threads)
    writer.finish()
    return _report(out, len(jobs), time.monotonic() - started)


def _forecast(environment: Environment, plan: Plan, missing: int, there: int, workers: int) -> str:
    task = environment.task
    observation = environment.reset(plan.seed)
    expert = environment.expert()
    environment.render()  # the first one compiles and loads textures
    started = time.perf_counter()
    for _ in range(_FORECAST_STEPS):
        environment.render()
    rate = _FORECAST_STEPS / (time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(_FORECAST_STEPS):
        observation = environment.step(expert(observation)).observation
    acting = (time.perf_counter() - started) / _FORECAST_STEPS
    steps = task.horizon
    if task.measure != "return":
        steps = min(_TYPICAL_STEPS + plan.after_success, steps)
    minutes = missing * steps * (1 / rate + acting) / workers / 60
    return (
        f"{missing} demonstrations to record" + (f" ({there} are there)" if there else "")
        + f", about {missing * steps:,} pictures of {plan.size} x {plan.size} pixels at {rate:.0f} a second in each of "
        f"{workers} processes, and {1000 * acting:.0f} ms for each action: about {max(1, minutes):.0f} min."
    )  # fmt: skip


def _work(plan: Plan, out: Path, jobs: Sequence[tuple[str, int]], workers: int, threads: int) -> None:
    if not jobs:
        return
    # A forked process would share the parent's connection to OpenGL.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, _begin_worker) as pool,
        tqdm(total=len(jobs), unit="episode", desc="collect", smoothing=0.1) as bar,
    ):
        futures = [pool.submit(demonstrate, plan, out, task, number, threads) for task, number in jobs]
        try:
            frames = 0
            for future in as_completed(futures):
                frames += future.result()
                bar.set_postfix_str(f"{frames} frames", refresh=False)
                bar.update()
        except BrokenProcessPool as error:
            raise SimulationError(
                "A recording process was killed, perhaps for want of memory. Run the same command again, with fewer "
                "--workers; finished episodes are kept."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    # Mesa renders with a thread per core otherwise, in each of the processes.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Ends this process with its parent, even if that was killed."""
    parent.join()
    os._exit(1)


def _report(out: Path, recorded: int, seconds: float) -> str:
    folder = LeRobotFolder(out)
    rows = [{**episode.record, "length": episode.length} for episode in folder.episodes]
    there = f"{out} has {len(rows)} in all, with {folder.frame_count:,} frames"
    return f"{table(summarize(rows))}\n\nDemonstrations recorded now: {recorded}, in {seconds:.0f} s; {there}."
