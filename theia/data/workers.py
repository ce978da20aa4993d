"""Processes that fill slots, asked and answered through pipes. A batch itself never passes through a pipe.

Not torch's ``DataLoader``: it notices a dead worker in a signal handler, which raises a bare ``RuntimeError`` from
whatever line the training happens to be at, and its queues need a thread in every process.
"""

import gc
import multiprocessing
import multiprocessing.util
import signal
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from theia.data.sampler import Rows
from theia.errors import StoreError, WorkerError

Fill = Callable[[int, Rows], None]
# Those of all loaders of this process: training asks for batches while the workers of validation idle.
_all: "weakref.WeakSet[Workers]" = weakref.WeakSet()


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Workers:
    """Fills slots in the order in which it is asked to; the ``n``-th request goes to worker ``n`` modulo their number.

    Workers run from :meth:`start` to :meth:`close`, and no longer than this process, however it ends: their pipes close
    with it.

    Args:
        fill: ``fill(slot, rows)`` reads samples into a slot. Called in the workers.
        count: Number of workers; 0 fills in this process, when the slot is taken.
        source: What is read, for messages.
    """

    def __init__(self, fill: Fill, count: int, source: str) -> None:
        self._fill = fill
        self._count = count
        self._source = source
        self._workers: list[_Worker] = []
        self._asked: deque[tuple[int, Rows]] = deque()
        self._requests = 0  # sent since the start
        self._finalizer: Callable[[], object] | None = None
        _all.add(self)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that were started."""
        return [worker.process.pid or 0 for worker in self._workers]

    def start(self) -> None:
        """Starts the workers, unless they run, and forgets what was asked before and not taken."""
        while self._asked and self._workers:
            self.take()
        self._asked.clear()
        if self._workers or not self._count:
            return
        self._requests = 0
        # What this process does on a signal is not for a worker to do, not even in its first instant.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        try:
            self._workers = [_start(self._fill) for _ in range(self._count)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        # Before multiprocessing's own end of its children, which asks with the signal that they do not listen to.
        self._finalizer = multiprocessing.util.Finalize(self, _stop, (self._workers,), exitpriority=0)

    def ask(self, slot: int, rows: Rows) -> None:
        """Has a slot filled.

        Raises:
            WorkerError: If a worker has died, be it one of another loader: better now than when it is needed.
        """
        for workers in _all:
            workers._check()
        self._asked.append((slot, rows))
        if not self._workers:
            return
        worker = self._workers[self._requests % self._count]
        self._requests += 1
        try:
            worker.pipe.send((slot, rows))
        except OSError as error:
            raise self._death(worker) from error

    def take(self) -> tuple[int, Rows]:
        """The oldest slot asked for, with its samples; waits until it is filled.

        Raises:
            StoreError: If its samples cannot be read.
            WorkerError: If the worker that was to fill it has died.
        """
        slot, rows = self._asked.popleft()
        if not self._workers:
            self._fill(slot, rows)
            return slot, rows
        worker = self._workers[(self._requests - len(self._asked) - 1) % self._count]
        try:
            error = worker.pipe.recv()
        except (EOFError, OSError) as end:
            raise self._death(worker) from end
        if error is not None:
            raise error
        return slot, rows

    def close(self) -> None:
        """Ends the workers. The next :meth:`start` makes new ones."""
        if self._finalizer is not None:
            self._finalizer()
        self._workers = []
        self._asked.clear()

    def _check(self) -> None:
        for worker in self._workers:
            if worker.process.exitcode is not None:
                raise self._death(worker)

    def _death(self, worker: _Worker) -> WorkerError:
        number, pid = self._workers.index(worker), worker.process.pid
        worker.process.join()  # its pipe closes a moment before its status is known
        status = worker.process.exitcode
        self.close()
        if status == -signal.SIGKILL:
            how = "was killed (SIGKILL): if nobody did so by hand, then by the kernel because memory ran out"
        elif status is not None and status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        else:
            how = f"ended with status {status}; what it printed says why"
        return WorkerError(
            f"Reading worker {number} of {self._count} (pid {pid}) {how}. It was reading from {self._source}. "
            "A training goes on from its last checkpoint with --ckpt_path last; where memory is short, lower "
            "data.workers, data.batch_size or data.val_batch_size."
        )


def _start(fill: Fill) -> _Worker:
    # A fork: the slots are anonymous shared memory, which only it inherits. Unlike /dev/shm, containers do not limit
    # such memory, and nothing of it is left behind when a process is killed.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(fill, theirs, ours), daemon=True)
    process.start()
    theirs.close()  # the worker's own end must be the only one, so that its death closes the pipe
    return _Worker(process, ours)


def _serve(fill: Fill, pipe: Connection, parents: Connection) -> None:
    parents.close()
    gc.freeze()  # what was inherited is the parent's to finalize: its workers, its device memory
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
    # Ctrl-C, and what a scheduler sends at the end of its time, reach all processes; the first one answers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with suppress(EOFError, ConnectionError):  # the training process has ended
        while True:
            slot, rows = pipe.recv()
            try:
                fill(slot, rows)
            except StoreError as error:
                pipe.send(error)  # raised over there: a worker's own traceback would bury the message
            else:
                pipe.send(None)


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # it only reads: nothing can be left half done
    for worker in workers:
        worker.process.join()
        worker.process.close()
        worker.pipe.close()
