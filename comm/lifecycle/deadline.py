"""A deadline that holds even while the main thread hangs inside a library."""

import threading
import time
from collections.abc import Callable

from comm.lifecycle.exit import report_and_exit
from comm.timing import DEFAULT_TIMING


class Deadline:
    """Ends the process `seconds` (plus a small grace) from now unless it is cancelled before.

    torch's TCPStore client can hang past its own timeout if a foreign program listens at the port.
    It releases the interpreter lock meanwhile, so that the deadline's thread can still act.
    """

    def __init__(self, seconds: float, *, grace: float = DEFAULT_TIMING.join_grace) -> None:
        self.seconds = seconds
        self._grace = grace
        self._started = time.monotonic()
        self._verdict = (1, "")
        self._end: Callable[[int, str], object] = report_and_exit
        self._cancelled = threading.Event()
        threading.Thread(target=self._wait, name="join-deadline", daemon=True).start()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float:
        """Seconds until the deadline (without the grace); negative once it has passed."""
        return self.seconds - self.elapsed

    @property
    def progress(self) -> str:
        """`20 s of 300 s`."""
        return f"{self.elapsed:.0f} s of {self.seconds:g} s"

    def expect(self, *, status: int, line: str) -> None:
        """Sets the line and the exit status for the case that the deadline passes."""
        self._verdict = (status, line)

    def hand_over(self, end: Callable[[int, str], object]) -> None:
        """Lets `end` end the process from now on; it is called with exit status and line."""
        self._end = end

    def cancel(self) -> None:
        """Lifts the deadline."""
        self._cancelled.set()

    def _wait(self) -> None:
        if not self._cancelled.wait(self.seconds + self._grace):
            self._end(*self._verdict)
