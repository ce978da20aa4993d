"""Progress of one stage: images/s, bytes, time left."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


def readable_bytes(count: float) -> str:
    """Formats a number of bytes in powers of 1000, such as ``1.7 MB``."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 999.5 and (larger := next(units, None)):
        count, unit = count / 1000, larger
    return f"{count:.3g} {unit}"


class Progress:
    """A bar on a terminal; elsewhere, such as in a job's log file, a line every half minute.

    Args:
        label: Name of the work.
        total: Number of items to do.
        shown: Whether this process shows its progress; true in one process only.
        unit: Name of the items; images by default.
        done: Number of items that were done before, which the speed does not count.
    """

    def __init__(self, label: str, total: float, shown: bool = True, unit: str = "img", done: int = 0) -> None:
        self._label, self._total, self._unit, self._before = label, total, unit, done
        self._images, self._bytes, self._note = done, 0, ""
        self._started = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal
        self._bar = tqdm(
            desc=label, total=total, unit=unit, initial=done, smoothing=0.1, dynamic_ncols=True,
            leave=None,  # a bar below another one goes away at its end
            disable=not (shown and terminal),
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finished=error is None)

    def close(self, finished: bool = True) -> None:
        """Ends the bar, or writes a last line.

        Args:
            finished: Whether there is to be such a line.
        """
        self._bar.close()
        if finished:
            self._line()

    def describe(self, label: str, note: str) -> None:
        """Says from now on which part of the work is done, and a few words behind the figures.

        Args:
            label: Name of the part.
            note: The words, such as a loss.
        """
        self._label, self._note = label, note
        self._bar.set_description_str(f"{label}: ", refresh=False)

    def advance(self, images: int, stored: int = 0) -> None:
        """Counts finished work.

        Args:
            images: Number of images done.
            stored: Number of bytes written for them; not shown if there are none.
        """
        self._images += images
        self._bytes += stored
        self._bar.set_postfix_str(self._postfix(), refresh=False)
        self._bar.update(images)
        if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        if not self._lines:
            return
        self._last_line = time.monotonic()
        # Without a bar, tqdm's meter still does the arithmetic and the wording.
        meter = tqdm.format_meter(
            self._images,
            self._total,
            self._last_line - self._started,
            ncols=0,
            prefix=self._label,
            unit=self._unit,
            initial=self._before,
            postfix=self._postfix(),
        )
        logger.info("%s", meter)

    def _postfix(self) -> str:
        return self._note or (readable_bytes(self._bytes) if self._bytes else "")
