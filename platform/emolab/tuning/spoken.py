"""Lines for people, and how long there has been none."""

from __future__ import annotations

import time
from collections.abc import Callable


class Spoken:
    """Passes lines on; after a silence it asks for one, so that long work is seen to go on."""

    def __init__(self, report: Callable[[str], None], *, silence_s: float) -> None:
        """
        Args:
            silence_s: seconds without a line after which one is due.
        """
        self._report, self._silence_s = report, silence_s
        self._last = time.monotonic()

    def __call__(self, line: str) -> None:
        self._last = time.monotonic()
        self._report(line)

    def break_silence(self, line: Callable[[], str]) -> None:
        """Say this where one is due."""
        if time.monotonic() - self._last >= self._silence_s:
            self(line())
