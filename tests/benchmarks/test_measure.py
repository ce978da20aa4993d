import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from benchmarks.throughput.measure import Cost, Measure, cost_of, interleave, ratios

# Burns processor time by its own clock, then says what it has taken in all: now, and again when it is asked to end.
_BURN = """
import sys, time
while time.process_time() < 0.3: pass
print(time.process_time(), flush=True)
sys.stdin.read()
print(time.process_time(), flush=True)
"""
_TICK_S = 0.011  # the kernel tells what a running process has taken in hundredths of a second


class Burning:
    """A child that has taken ``used`` seconds of processor time by its own account."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.used = float(self._process.stdout.readline())

    def end(self) -> float:
        said, _ = self._process.communicate("")
        self.used = float(said)
        return self.used


def around(work: Callable[[], object]) -> tuple[Cost, float]:
    """What some work is said to cost, and the processor time that this process took for it and the measuring."""
    before = time.process_time()
    cost = cost_of(work)
    return cost, time.process_time() - before


def test_own_processor_time_counts_whichever_thread_takes_it() -> None:
    def burn() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    def work() -> None:
        thread = threading.Thread(target=burn)
        thread.start()
        thread.join()

    cost, own = around(work)
    assert 0.2 <= cost.cpu_s <= own


def test_processor_time_of_a_child_that_has_ended_counts() -> None:
    said = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost, own = around(lambda: said.append(Burning().end()))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert said[0] - _TICK_S <= cost.cpu_s <= children + own + _TICK_S


def test_processor_time_of_a_child_that_still_runs_counts() -> None:
    children: list[Burning] = []
    cost, own = around(lambda: children.append(Burning()))
    (child,) = children
    used = child.used
    assert used - 2 * _TICK_S <= cost.cpu_s <= child.end() + own + _TICK_S


def test_what_a_child_took_before_does_not_count() -> None:
    child = Burning()
    before = child.used
    cost, own = around(lambda: None)
    # Of the child at most what it took between its two accounts.
    assert cost.cpu_s <= own + child.end() - before + 2 * _TICK_S
    assert before >= 0.3


def test_waiting_takes_wall_time_only() -> None:
    cost, own = around(lambda: time.sleep(0.2))
    assert cost.wall_s >= 0.2
    assert cost.cpu_s <= own


def test_contenders_take_turns_and_every_other_round_goes_backwards() -> None:
    order: list[str] = []
    costs = interleave({name: lambda name=name: order.append(name) for name in "abc"}, pairs=3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(values) for name, values in costs.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_pair_the_turns_of_one_round() -> None:
    costs = {"slow": [Cost(2, 6), Cost(8, 8)], "fast": [Cost(1, 2), Cost(2, 1)]}
    assert ratios(costs, "slow", "fast", "wall_s") == [2, 4]
    assert ratios(costs, "slow", "fast", "cpu_s") == [3, 8]


def test_a_cost_is_shared_by_the_runs_of_a_turn() -> None:
    assert Cost(3, 6) / 3 == Cost(1, 2)


@pytest.mark.parametrize(
    ("values", "at_most", "reached"),
    [([1, 2, 9], False, True), ([1, 1.9, 9], False, False), ([1, 2, 9], True, True), ([1, 2.1, 9], True, False)],
)
def test_an_aim_is_reached_by_the_median(values: list[float], at_most: bool, reached: bool) -> None:
    assert Measure("", values, aim=2, at_most=at_most).reached is reached


def test_without_an_aim_nothing_is_reached_or_missed() -> None:
    assert Measure("", [1.0]).reached is None
