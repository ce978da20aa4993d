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
    """

    def __init__(self, label: str, total: int, shown: bool = True, unit: str = "img") -> None:
        self._label, self._total, self._unit = label, total, unit
        self._images = self._bytes = 0
        self._started = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal
        self._bar = tqdm(
            desc=label, total=total, unit=unit, smoothing=0.1, dynamic_ncols=True, disable=not (shown and terminal)
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if error is None:
            self._line()

    def advance(self, images: int, stored: int = 0) -> None:
        """Counts finished work.

        Args:
            images: Number of images done.
            stored: Number of bytes written for them; not shown if there are none.
        """
        self._images += images
        self._bytes += stored
        self._bar.set_postfix_str(self._stored(), refresh=False)
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
            postfix=self._stored(),
        )
        logger.info("%s", meter)

    def _stored(self) -> str:
        return readable_bytes(self._bytes) if self._bytes else ""
