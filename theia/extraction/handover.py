"""A thread that finishes work while its caller goes on with the next."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import ParamSpec

P = ParamSpec("P")


class Handover:
    """Does what it is given in one thread, in order, and is never more than one piece of work behind.

    The thread has one piece at a time and none waits for it: whoever gives the next one waits until the last is done.
    So there is memory for two, the one in work and the one that the caller prepares.

    As a context manager: leaving it ends the thread, and raises the error of the last piece if there is no other.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "handover")
        self._last: Future[object] | None = None

    def __enter__(self) -> "Handover":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish_last()
        finally:
            self._thread.shutdown()

    def give(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Hands over the next piece of work, once the last one is done.

        Args:
            work: What to call in the thread.
            args: Its arguments.
            kwargs: Likewise.

        Raises:
            BaseException: What the last piece raised, as it was raised there; this one is not begun then.
        """
        self._finish_last()
        # The executor drops what it was given a moment after the work is done, too late for a bound on memory.
        piece = [partial(work, *args, **kwargs)]
        self._last = self._thread.submit(lambda: piece.pop()())

    @contextmanager
    def done(self) -> Iterator[None]:
        """What is given inside is done, well or not, when the block is left, however it is left.

        For work that uses what its caller is going to close: an error of the caller, or Ctrl-C, must not take it away
        under the thread.

        Raises:
            BaseException: What the last piece raised, if the block itself ends well.
        """
        try:
            yield
        except BaseException:
            if self._last is not None:
                wait([self._last])
            raise
        self._finish_last()

    def _finish_last(self) -> None:
        if self._last is None:
            return
        wait([self._last])
        # Not forgotten before it is done, whatever interrupts the waiting; its error is raised once.
        last, self._last = self._last, None
        last.result()
