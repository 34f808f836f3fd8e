"""Wall time of iterations, with what is no training left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, without pauses."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block counts in no lap."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
