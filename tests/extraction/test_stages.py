import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from events import PATIENCE_S

from theia.extraction import stages
from theia.extraction.stages import Handover


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Batch:
    """Something that a weak reference can watch."""


def fail(message: str) -> None:
    raise OSError(message)


def test_work_is_done_in_order_in_another_thread() -> None:
    done = []
    with Handover() as storing:
        for number in range(20):
            storing.give(lambda number: done.append((number, threading.get_ident())), number)
    assert [number for number, _ in done] == list(range(20))
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_the_caller_goes_on_while_the_work_is_done() -> None:
    caller_went_on = threading.Event()
    seen = []
    with Handover() as storing:
        storing.give(lambda: seen.append(caller_went_on.wait(PATIENCE_S)))
        caller_went_on.set()
    assert seen == [True]


def test_no_more_than_two_pieces_are_alive() -> None:
    alive: weakref.WeakSet[Batch] = weakref.WeakSet()
    counts = []
    next_one = [threading.Event() for _ in range(11)]
    with Handover() as storing:
        for number in range(10):
            batch = Batch()
            alive.add(batch)
            counts.append(len(alive))
            next_one[number].set()
            # In work until its caller has the next one.
            storing.give(lambda batch, come: come.wait(PATIENCE_S), batch, next_one[number + 1])
        next_one[10].set()
    assert counts == [1] + [2] * 9


def test_an_error_is_raised_at_the_next_hand_over_as_it_was_raised() -> None:
    done: list[str] = []

    def work() -> None:
        with Handover() as storing:
            storing.give(fail, "disk")
            storing.give(done.append, "next")

    with pytest.raises(OSError, match=r"^disk$") as error:
        work()
    assert "fail" in [frame.name for frame in traceback.extract_tb(error.tb)]
    assert not done


def test_an_error_of_the_last_piece_is_raised_at_the_end() -> None:
    with pytest.raises(OSError, match=r"^disk$"), Handover() as storing:
        storing.give(fail, "disk")


def test_the_callers_own_error_comes_first() -> None:
    def work() -> None:
        with Handover() as storing:
            storing.give(fail, "disk")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()


@pytest.mark.parametrize("stopped_by", [None, KeyboardInterrupt, ValueError])
def test_what_the_work_uses_is_not_closed_before_it_is_done(
    stopped_by: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    caller_stands_still = threading.Event()
    wait = stages.wait

    def watched(futures: list[Future[object]]) -> object:
        caller_stands_still.set()
        return wait(futures)

    monkeypatch.setattr(stages, "wait", watched)

    def slow() -> None:
        assert caller_stands_still.wait(PATIENCE_S)
        events.append("done")

    def use() -> None:
        with Handover() as storing:
            try:
                with storing.done():
                    storing.give(slow)
                    if stopped_by:
                        raise stopped_by
            finally:
                events.append("closed")
                caller_stands_still.set()  # too late

    if stopped_by:
        with pytest.raises(stopped_by):
            use()
    else:
        use()
    assert events == ["done", "closed"]


def test_an_error_of_the_work_is_raised_once_and_before_what_it_used_is_closed() -> None:
    with Handover() as storing, pytest.raises(OSError, match=r"^disk$"), storing.done():
        storing.give(fail, "disk")


@pytest.mark.parametrize("quiet", [True, False])
def test_a_decoding_process_says_nothing_when_the_main_one_leaves_in_the_middle(quiet: bool) -> None:
    code = f"""
import os, socket
from multiprocessing.resource_sharer import DupFd
from theia.extraction.stages import end_quietly

if {quiet}:
    end_quietly(0)
handed = DupFd(os.open(os.devnull, os.O_RDONLY))
with socket.socket(socket.AF_UNIX) as leaving:
    leaving.connect(handed._id[0])
handed.detach()  # is served after the one that left
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("resource_sharer" in done.stderr) is not quiet
