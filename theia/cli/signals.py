"""How ``theia fit``, ``validate`` and ``test`` end after a signal: what is said, and with which exit status."""

import logging
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from theia.cli.options import without
from theia.training.checkpoints import LAST, StopRequested, requeue

logger = logging.getLogger(__name__)

_SIGNALLED = 128  # plus the number of the signal: the exit status that a shell reports for a program ended by a signal


def until_signalled(work: Callable[[], object], argv: Sequence[str]) -> int:
    """Does work that a signal may end.

    Args:
        work: Function to call; a training in it writes a checkpoint when a signal asks it to stop.
        argv: The command and its options, to say how to go on.

    Returns:
        Exit status: 0, or 128 plus the number of a signal that asked to stop.
    """
    try:
        with _stopped_by_signals():
            work()
    except StopRequested as stop:
        if not getattr(rank_zero_only, "rank", 0):
            again = shlex.join(["theia", *without("ckpt_path", argv), "--ckpt_path", "last"])
            logger.warning(
                "Stopped after step %d, as a signal asked for. %s holds it. Go on with: %s", stop.step, LAST, again
            )
        return _SIGNALLED + stop.number
    except SIGTERMException:  # Lightning would exit with 0, as if all work were done
        return _SIGNALLED + signal.SIGTERM
    except _Stopped as stop:
        return _ended(stop)
    except SystemExit as stop:
        if isinstance(stop.__context__, _Stopped):
            return _ended(stop.__context__)
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    return 0


class _Stopped(KeyboardInterrupt):
    """A signal came before or after training, when there is nothing to save.

    Lightning treats it as a Ctrl-C, so that it ends the other processes of this machine, too.
    """

    number: int


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Makes signals that ask to stop work at once, while training does not handle them itself."""

    def stop(number: int, *_: Any) -> None:
        stopped = _Stopped()
        stopped.number = number
        raise stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(stopped: _Stopped) -> int:
    if stopped.number == signal.SIGUSR1:
        requeue()
    logger.warning("Stopped by a signal, %s, when no training was under way.", signal.Signals(stopped.number).name)
    return _SIGNALLED + stopped.number
