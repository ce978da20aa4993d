"""What a process and all its children hold, over time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

_SHARED_MEMORY = "/dev/shm/"


@dataclass(frozen=True)
class Sample:
    """One look at a tree of processes.

    Attributes:
        seconds: Seconds since watching began.
        pss_mb: Memory in MB; pages that several processes share count once (proportional set size).
        uss_mb: Memory in MB that belongs to one process alone, summed.
        rss_mb: Resident memory in MB of the first process.
        descriptors: Number of open file descriptors, summed.
        threads: Number of threads, summed.
        processes: Number of processes.
        shared_memory: Number of files in ``/dev/shm`` that they have mapped.
    """

    seconds: float
    pss_mb: float
    uss_mb: float
    rss_mb: float
    descriptors: int
    threads: int
    processes: int
    shared_memory: int


class Watch:
    """Looks at a process and its children until it ends.

    Args:
        pid: Id of the process.
    """

    def __init__(self, pid: int) -> None:
        self._first = psutil.Process(pid)
        self._seen = {self._first}
        self._shared_memory: set[str] = set()
        self._began = time.perf_counter()
        self.samples: list[Sample] = []

    def follow(self, alive: Callable[[], bool], every_s: float) -> Iterator[Sample]:
        """Looks, again and again, until the process has ended.

        Args:
            alive: Function that says whether it still runs.
            every_s: Seconds between two looks.
        """
        while alive():
            sample = self._look()
            if sample is not None:
                self.samples.append(sample)
                yield sample
            end = time.perf_counter() + every_s
            while alive() and time.perf_counter() < end:
                time.sleep(min(0.2, every_s))

    def left_behind(self) -> dict[str, int]:
        """Number of watched processes, and of their files of shared memory, that are still there."""
        # Where nobody reaps the orphans of a container they stay as zombies, which hold nothing.
        alive = [process for process in self._seen if process.is_running() and not _zombie(process)]
        return {"processes": len(alive), "shared_memory": sum(Path(path).exists() for path in self._shared_memory)}

    def _look(self) -> Sample | None:
        pss = uss = rss = descriptors = threads = 0
        mapped: set[str] = set()
        try:
            tree = [self._first, *self._first.children(recursive=True)]
            for process in tree:
                memory = process.memory_full_info()
                pss, uss = pss + memory.pss, uss + memory.uss
                if process == self._first:
                    rss = memory.rss
                descriptors += process.num_fds()
                threads += process.num_threads()
                mapped |= {area.path for area in process.memory_maps() if area.path.startswith(_SHARED_MEMORY)}
        except psutil.Error:
            return None  # one has just ended: half a sum would look like a fall
        self._seen.update(tree)
        self._shared_memory |= mapped
        return Sample(
            seconds=time.perf_counter() - self._began,
            pss_mb=pss / 1e6,
            uss_mb=uss / 1e6,
            rss_mb=rss / 1e6,
            descriptors=descriptors,
            threads=threads,
            processes=len(tree),
            shared_memory=len(mapped),
        )


def slope_per_hour(seconds: list[float], values: list[float]) -> float:
    """Slope of the least-squares line.

    Args:
        seconds: Times, in seconds.
        values: Values, one for each time.

    Returns:
        Units of the values per hour.
    """
    return float(np.polyfit(np.array(seconds) / 3600, np.array(values), 1)[0])


def _zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
