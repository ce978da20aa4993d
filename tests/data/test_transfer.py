"""The device is played by the CPU, its streams by a log of who waits for whom."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from theia.data.loader import FeatureLoader
from theia.data.ring import HELD
from theia.data.sampler import EvaluationSampler
from theia.store.reader import FeatureStore, Split

CPU = torch.device("cpu")


@dataclass
class Driver:
    """Stands in for ``torch.cuda``: what was asked of it, in order."""

    log: list[tuple[str, int]] = field(default_factory=list)
    locked: set[int] = field(default_factory=set)
    lockable: int = 10_000
    copies: int = 0

    # The stream of the copies.
    def wait_stream(self, other: object) -> None:
        self.log.append(("copy waits for work", self.copies))

    def record_event(self) -> SimpleNamespace:
        number = self.copies
        self.copies += 1
        return SimpleNamespace(number=number, synchronize=lambda: self.log.append(("refill waits for copy", number)))

    def synchronize(self) -> None: ...

    # The stream of the training.
    def wait_event(self, event: SimpleNamespace) -> None:
        self.log.append(("work waits for copy", event.number))

    # The runtime.
    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.locked) == self.lockable:
            return 2
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.locked.remove(address)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()

    def check_error(status: int) -> None:
        if status:
            raise RuntimeError("out of memory")

    for name, value in {
        "Stream": lambda device: driver,
        "current_stream": lambda device: driver,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "cudart": lambda: driver,
        "check_error": check_error,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return driver


@pytest.fixture
def split(store: Path) -> Split:
    return FeatureStore(store).open_split("train")


@pytest.fixture
def loader(split: Split, driver: Driver) -> Iterator[FeatureLoader]:
    loader = FeatureLoader(split, EvaluationSampler(np.arange(len(split)), 12), workers=1, device=CPU)
    yield loader
    loader.close()


def test_batches_hold_what_was_read_until_held_more_are_taken(loader: FeatureLoader, split: Split) -> None:
    held: list[tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]] = []
    for batch in loader:
        expected = split.allocate(len(batch.rows))
        split.read_into(batch.rows.numpy(), expected)
        expected["labels"] = split.labels[batch.rows.numpy()]
        given = {"image": batch.images, "labels": batch.labels, **batch.patches, "beta/cls": batch.cls["beta"]}
        held = [*held[-HELD + 1 :], (given, expected)]
        for tensors, arrays in held:
            assert tensors.keys() == arrays.keys()
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(tensor.numpy(), arrays[name])


def test_each_copy_starts_a_batch_early_behind_earlier_work_and_is_waited_for(
    loader: FeatureLoader, driver: Driver
) -> None:
    last = len(loader) - 1
    expected = []
    for batch in range(len(loader)):
        starts = {0: [0, 1]}.get(batch, [batch + 1] if batch < last else [])
        expected += [("copy waits for work", copy) for copy in starts]
        expected.append(("work waits for copy", batch))

    for _ in loader:
        pass

    assert [entry for entry in driver.log if entry[0] != "refill waits for copy"] == expected
    waited = [number for what, number in driver.log if what == "refill waits for copy"]
    assert waited == list(range(len(loader) - len(loader._ring.slots)))


def test_memory_is_page_locked_while_the_loader_is_in_use(loader: FeatureLoader, driver: Driver) -> None:
    next(iter(loader))
    assert driver.locked == {array.ctypes.data for slot in loader._ring.slots for array in slot.arrays.values()}

    loader.close()

    assert not driver.locked


def test_memory_that_cannot_be_page_locked_is_used_as_it_is_and_said_once(
    loader: FeatureLoader, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.lockable = 3

    with caplog.at_level(logging.WARNING, "theia"):
        for _ in range(2):
            assert sum(len(batch.rows) for batch in loader) == 80

    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "Memory for batches cannot be page-locked (out of memory)"
    ]
    assert not driver.locked
