"""Worker processes that fill slots. Requests and answers go through pipes, the batches themselves do not.

This is not torch's ``DataLoader``, which notices a dead worker in a signal handler that raises a bare ``RuntimeError``
from whatever line the training has reached, and whose queues need a thread in every process.
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
from typing import NamedTuple

from theia.data.sampler import Rows
from theia.errors import TheiaError, WorkerError


class Request(NamedTuple):
    """Samples that are to be read into a slot.

    Attributes:
        slot: Number of the slot.
        rows: Row numbers of the samples.
        epoch: Number of the epoch, for samples that are not the same in each.
        without: Names of the teachers whose features are not read.
    """

    slot: int
    rows: Rows
    epoch: int = 0
    without: Sequence[str] = ()


Fill = Callable[[Request], None]
# Workers of all loaders in this process: validation's workers may die while only training requests batches.
_all: "weakref.WeakSet[Workers]" = weakref.WeakSet()


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Workers:
    """Fills slots in the order of the requests; the ``n``-th request goes to worker ``n`` modulo their number.

    Workers run from :meth:`start` to :meth:`close`. They never outlive this process, however it ends, because their
    pipes close with it.

    Args:
        fill: Function ``fill(request)`` that reads samples into a slot; called in the workers.
        count: Number of workers; with 0, this process fills a slot when it is taken.
        source: Name of the data that are read, for messages.
    """

    def __init__(self, fill: Fill, count: int, source: str) -> None:
        self._fill = fill
        self._count = count
        self._source = source
        self._workers: list[_Worker] = []
        self._asked: deque[Request] = deque()
        self._requests = 0  # number of requests sent since the start
        self._finalizer: Callable[[], object] | None = None
        _all.add(self)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.process.pid or 0 for worker in self._workers]

    def start(self) -> None:
        """Starts the workers unless they are running, and drops earlier requests whose slots were not taken."""
        while self._asked and self._workers:
            self.take()
        self._asked.clear()
        if self._workers or not self._count:
            return
        self._requests = 0
        # A worker must not run this process's signal handlers, not even right after the fork.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        try:
            self._workers = [_start(self._fill) for _ in range(self._count)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        # Runs before multiprocessing ends its children by SIGTERM, which the workers ignore.
        self._finalizer = multiprocessing.util.Finalize(self, _stop, (self._workers,), exitpriority=0)

    def ask(self, request: Request) -> None:
        """Requests that a slot be filled.

        Raises:
            WorkerError: If a worker has died, of this or another loader, so that the error comes before it is needed.
        """
        for workers in _all:
            workers._check()
        self._asked.append(request)
        if not self._workers:
            return
        worker = self._workers[self._requests % self._count]
        self._requests += 1
        try:
            worker.pipe.send(request)
        except OSError as error:
            raise self._death(worker) from error

    def take(self) -> Request:
        """Waits until the oldest requested slot is filled, and gives the request.

        Raises:
            TheiaError: If the samples cannot be read.
            WorkerError: If the worker for this slot has died.
        """
        request = self._asked.popleft()
        if not self._workers:
            self._fill(request)
            return request
        worker = self._workers[(self._requests - len(self._asked) - 1) % self._count]
        try:
            error = worker.pipe.recv()
        except (EOFError, OSError) as end:
            raise self._death(worker) from end
        if error is not None:
            raise error
        return request

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
        worker.process.join()  # the pipe closes a moment before the exit status is known
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
    # A fork, because only a forked process inherits the slots, which are anonymous shared memory. Unlike /dev/shm,
    # containers do not limit such memory, and it is freed when the processes are killed.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(fill, theirs, ours), daemon=True)
    process.start()
    theirs.close()  # the worker must hold the only copy of its end, so that its death closes the pipe
    return _Worker(process, ours)


def _serve(fill: Fill, pipe: Connection, parents: Connection) -> None:
    parents.close()
    gc.freeze()  # inherited objects, such as workers and device memory, are for the parent to finalize
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
    # Ctrl-C and a scheduler's signals reach all processes; only the training process answers them.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with suppress(EOFError, ConnectionError):  # the training process has ended
        while True:
            request = pipe.recv()
            try:
                fill(request)
            except TheiaError as error:
                pipe.send(error)  # raised in the training process: a worker's traceback would bury the message
            else:
                pipe.send(None)


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # a worker only reads, so nothing is left half done
    for worker in workers:
        worker.process.join()
        worker.process.close()
        worker.pipe.close()
