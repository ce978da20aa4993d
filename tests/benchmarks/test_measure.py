import subprocess
import sys
import threading
import time

import pytest

from benchmarks.throughput.measure import Cost, Measure, cost_of, interleave, ratios

# Burns processor time by its own clock, then says so.
_BURN = "import time\nwhile time.process_time() < {seconds}: pass\nprint('done', flush=True)\n"


def burning(seconds: float, then: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _BURN.format(seconds=seconds) + then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_own_processor_time_counts_whichever_thread_takes_it() -> None:
    def burn() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    def work() -> None:
        thread = threading.Thread(target=burn)
        thread.start()
        thread.join()

    assert 0.2 <= cost_of(work).cpu_s < 0.4


def test_processor_time_of_a_child_that_has_ended_counts() -> None:
    cost = cost_of(lambda: burning(0.3).communicate())
    assert 0.28 <= cost.cpu_s < 0.6


def test_processor_time_of_a_child_that_still_runs_counts() -> None:
    children = []

    def work() -> None:
        children.append(burning(0.3, then="import sys; sys.stdin.read()"))
        children[0].stdout.readline()

    cost = cost_of(work)
    children[0].communicate("")
    assert 0.28 <= cost.cpu_s < 0.6


def test_what_a_child_took_before_does_not_count() -> None:
    child = burning(0.3, then="import sys; sys.stdin.read()")
    assert child.stdout is not None
    child.stdout.readline()
    cost = cost_of(lambda: None)
    child.communicate("")
    assert cost.cpu_s < 0.1


def test_waiting_takes_wall_time_only() -> None:
    cost = cost_of(lambda: time.sleep(0.2))
    assert cost.wall_s >= 0.2
    assert cost.cpu_s < 0.1


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
