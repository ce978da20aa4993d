"""Writes a checkpoint beside the training: from a snapshot, in a thread, one at a time."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor


class Snapshot:
    """A copy of nested values in the memory of the host, which later training steps do not change.

    Copies from a GPU are queued behind the step that is running there, and the host does not wait for them. It may wait
    once, though: page-locking memory for the first snapshot can take as long as the GPU is busy.

    Args:
        values: Dictionaries, lists and tuples, with whatever they hold.
    """

    def __init__(self, values: Any) -> None:
        self._copied: dict[torch.device, Any] = {}
        self._values = self._copy(values)
        for device in self._copied:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._copied[device] = event

    def values(self) -> Any:
        """The copy, once all of it has arrived."""
        for event in self._copied.values():
            event.synchronize()
        return self._values

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, dict):
            copied = copy.copy(value)  # with what a state dict has besides its entries
            copied.update((name, self._copy(part)) for name, part in value.items())
            return copied
        if isinstance(value, list):
            return [self._copy(part) for part in value]
        if type(value) is tuple:
            return tuple(self._copy(part) for part in value)
        return value

    def _copy_tensor(self, value: Tensor) -> Tensor:
        if value.device.type != "cuda":
            return value.cpu() if value.device.type != "cpu" else value.clone()
        self._copied[value.device] = None
        # A copy to page-locked memory does not hold up the host. To lock it does, but torch keeps it for the next one.
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)


class Background:
    """Does one piece of work at a time in a thread of its own. An error of the work is raised later, and only once."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[], object]) -> None:
        """Begins a piece of work, as soon as the one before has ended.

        Raises:
            BaseException: If the one before failed; the new one is not begun then.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises the error of the work if it has failed already, and does not wait for its end."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the end of the work, and raises its error if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


class LaterCheckpoints(TorchCheckpointIO):
    """Takes a snapshot of a checkpoint and has it written in the background.

    Args:
        background: Place where the work is done.
        write: Function ``(checkpoint, path)`` that writes the file.
        then: Function to call in the background when the file is written.
    """

    def __init__(
        self, background: Background, write: Callable[[dict[str, Any], _PATH], None], then: Callable[[], None]
    ) -> None:
        super().__init__()
        self._background, self._write, self._then = background, write, then

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Takes the snapshot. When this returns, training may go on."""
        self._background.wait()  # before the copy, so that there are never two
        snapshot = Snapshot(checkpoint)

        def work() -> None:
            self._write(snapshot.values(), path)
            self._then()

        self._background.begin(work)
