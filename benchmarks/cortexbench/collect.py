"""Records demonstrations of many tasks in several processes, whole after any kill."""

import json
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
from benchmarks.cortexbench.scenes import check_factors
from benchmarks.cortexbench.simulation import (
    HORIZON,
    Environment,
    Quality,
    SimulationError,
    check_installed,
    find_opengl,
    find_tasks,
)
from theia.errors import ConfigError, TrajectoryError
from theia.trajectories.lerobot import LeRobotFolder
from theia.utils.arguments import MOST_PROCESSES, check_number, comma_list
from theia.utils.files import alone, check_folder, jsonable, write_whole
from theia.utils.provenance import installed

_RECORD = "meta/collection.json"
_MOST_PIXELS = 2048
_MOST_SEED = 2**31

# For the forecast: steps until success, in the middle over MetaWorld's tasks, and the size of a frame in a video.
_TYPICAL_STEPS = 78
_FORECAST_PICTURES = 10

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
    """

    task: str
    episodes: int
    attempts: int
    at_end: int
    steps: int
    seconds: float


def collect(
    tasks: str,
    out: Path,
    episodes: int = 25,
    vary: str | None = None,
    size: int = 256,
    noise: float = 0.0,
    after_success: int = 20,
    quality: Quality = "fast",
    pictures: Literal["video", "image"] = "video",
    workers: int | None = None,
    seed: int = 0,
) -> str:
    """Records demonstrations by MetaWorld's scripted experts as a data set folder of LeRobot.

    The same command goes on with a recording that was interrupted; with more episodes, it adds to one.

    Args:
        tasks: Names of tasks, such as drawer-open,hammer, separated by commas; metaworld stands for CortexBench's five.
        out: Folder for the data set.
        episodes: Number of demonstrations of each task. Those that fail are dropped, and replaced by the next seed.
        vary: What differs between episodes: any of camera, light, texture and distractor, separated by commas. By
            default, nothing.
        size: Height and width of the pictures, in pixels.
        noise: Standard deviation of the noise that is added to the expert's actions, which lie between -1 and 1. What
            the expert wanted is recorded too.
        after_success: Number of steps that are recorded after the first success. 500 gives the paper's whole horizon.
        quality: Quality of the pictures. The fast one is without antialiasing, shadows and reflections.
        pictures: How the pictures are kept: video is lossy, image is PNG files inside the tables.
        workers: Number of processes; by default, as many as there are cores.
        seed: First seed. Each episode has its own, on which objects, goal, camera, light and noise depend.

    Returns:
        A table of what the folder holds.

    Raises:
        ConfigError: If an option is wrong, the simulator is not installed, or another process works in the folder.
        TrajectoryError: If the folder holds another data set.
        SimulationError: If an expert fails again and again, or a process is killed.
    """
    check_installed()
    check_number("episodes", episodes, 1, MOST_EPISODES)
    check_number("size", size, 16, _MOST_PIXELS)
    check_number("noise", noise, 0, 1)
    check_number("after_success", after_success, 0, HORIZON)
    check_number("workers", workers, 1, MOST_PROCESSES)
    check_number("seed", seed, 0, _MOST_SEED)
    if size % 2 and pictures == "video":
        raise ConfigError(f"--size is {size}; videos need an even number. Or keep the pictures with --pictures image.")
    factors = check_factors(comma_list(vary))
    check_folder(out, "--out")
    plan = Plan(tuple(find_tasks(comma_list(tasks))), seed, factors, noise, after_success, size, quality, pictures)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with alone(out):
        return _record(plan, out, episodes, workers or cores)


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
            sum(row["success_at_end"] for row in mine),
            sum(row["length"] for row in mine),
            sum(row["seconds"] for row in mine),
        )
        for task, mine in by_task.items()
    ]


def table(summaries: Sequence[TaskSummary]) -> str:
    """The summaries as text."""
    rows = [
        (
            one.task, one.episodes, f"{one.episodes / one.attempts:.0%}", one.attempts - one.episodes,
            f"{one.at_end / one.episodes:.0%}", f"{one.steps / one.episodes:.0f}", f"{one.seconds:.0f}",
            f"{one.steps / one.seconds:.0f}",
        )
        for one in summaries
    ]  # fmt: skip
    headers = ("task", "episodes", "success", "dropped", "at last step", "steps", "seconds", "frames/s")
    return str(tabulate(rows, headers))


def _record(plan: Plan, out: Path, episodes: int, workers: int) -> str:
    find_opengl()
    started = time.monotonic()
    with Environment(plan.tasks[0], plan.size, plan.quality, plan.vary) as environment:
        writer = plan.open_writer(out, environment.frames_per_s)
        _check_record(plan, out)
        jobs = [
            (task, number)
            for task in plan.tasks
            for number in range(episodes)
            if not writer.has(plan.index(task, number))
        ]
        if jobs:
            workers = min(workers, len(jobs))
            there = len(plan.tasks) * episodes - len(jobs)
            tqdm.write(_forecast(environment, plan, len(jobs), there, workers), file=sys.stderr)
    _work(plan, out, jobs, workers)
    writer.finish()
    return _report(out, len(jobs), time.monotonic() - started)


def _forecast(environment: Environment, plan: Plan, missing: int, there: int, workers: int) -> str:
    environment.reset(plan.seed)
    environment.render()  # the first one compiles and loads textures
    started = time.perf_counter()
    for _ in range(_FORECAST_PICTURES):
        environment.render()
    rate = _FORECAST_PICTURES / (time.perf_counter() - started)
    steps = min(_TYPICAL_STEPS + plan.after_success, HORIZON)
    minutes = missing * steps / rate / workers / 60
    return (
        f"{missing} demonstrations to record" + (f" ({there} are there)" if there else "")
        + f", about {missing * steps:,} pictures of {plan.size} x {plan.size} pixels at {rate:.0f} a second in each of "
        f"{workers} processes: about {max(1, minutes):.0f} min."
    )  # fmt: skip


def _work(plan: Plan, out: Path, jobs: Sequence[tuple[str, int]], workers: int) -> None:
    if not jobs:
        return
    # A forked process would share the parent's connection to OpenGL.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, _begin_worker) as pool,
        tqdm(total=len(jobs), unit="episode", desc="collect", smoothing=0.1) as bar,
    ):
        futures = [pool.submit(demonstrate, plan, out, task, number) for task, number in jobs]
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
    there = f"{out} holds {len(rows)} of {folder.frame_count:,} frames"
    return (
        f"{table(summarize(rows))}\n\n{recorded} demonstrations recorded in {seconds:.0f} s; {there}.\n{NOT_COMPARABLE}"
    )


def _check_record(plan: Plan, out: Path) -> None:
    """Writes down with what options a data set was begun, or compares it with those of now."""
    path = out / _RECORD
    now = jsonable({**asdict(plan), "simulator": installed(("metaworld", "mujoco", "gymnasium", "numpy"))})
    if not path.exists():
        if any((out / "meta/episodes").glob("*/*.parquet")):
            raise TrajectoryError(f"{out} holds a data set that was not recorded by this command. Give a new folder.")
        write_whole(path, json.dumps(now, indent=2))
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise TrajectoryError(f"{path} cannot be read: {error}. Give a new folder.") from error
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        said = "; ".join(f"{name} {before.get(name)}, not {now[name]}" for name in different)
        raise TrajectoryError(
            f"{out} was begun with {said}. Go on with the same options and versions, or give a new folder."
        )
