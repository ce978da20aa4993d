"""One view of a sweep: what is done, what runs and how far it is, what failed, and the time left."""

import logging
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from theia.ablation.run import Run

logger = logging.getLogger(__name__)

_SHOWN = 3
_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """A bar over the optimisation steps of all runs; elsewhere than on a terminal, a line every half minute.

    Args:
        runs: All of the sweep, the finished ones too.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._failed: set[str] = set()
        self._last_line = float("-inf")
        self._started = time.monotonic()
        self._initial = sum(run.progress()[0] for run in runs)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=sum(run.steps for run in runs), initial=self._initial, unit="step", desc="sweep", dynamic_ncols=True,
            smoothing=0.05, disable=not self._terminal,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._last_line = float("-inf")
        self.update()
        self._bar.close()

    def fail(self, run: Run) -> None:
        """Counts a run as failed."""
        self._failed.add(run.name)

    def say(self, line: str) -> None:
        """Writes a line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def update(self) -> None:
        """Looks at the run folders."""
        if not self._terminal and time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        steps, total, running, finished = 0, 0, [], 0
        for run in self._runs:
            step, loss = run.progress()
            steps += step
            total += step if run.name in self._failed else run.steps  # what failed is no longer waited for
            if run.finished:
                finished += 1
            elif run.running:
                at = "tests" if run.trained.exists() else f"{step}/{run.steps}"
                running.append(f"{run.name} {at}" + ("" if loss is None else f" loss {loss:.3f}"))
        parts = [f"{finished} of {len(self._runs)} runs done"]
        if self._failed:
            parts.append(f"{len(self._failed)} failed")
        parts += running[:_SHOWN]
        if len(running) > _SHOWN:
            parts.append(f"{len(running) - _SHOWN} more running")
        text = "; ".join(parts)
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.total = total
            self._bar.update(steps - self._bar.n)
            self._bar.refresh()
        else:
            elapsed = time.monotonic() - self._started
            # Steps that were there before are no measure of the time left.
            logger.info("%s", tqdm.format_meter(
                steps, total, elapsed, prefix="sweep", unit="step", postfix=text, initial=self._initial, ncols=0,
            ))  # fmt: skip
