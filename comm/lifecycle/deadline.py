"""A deadline that holds even while the main thread hangs inside a library."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from comm.lifecycle.exit import exit_process, report_line

GRACE_SECONDS = 5.0


class Deadline:
    """Ends the process `seconds` (plus a small grace) from now unless cancelled before.

    torch's TCPStore client can hang past its own timeout before a foreign listener; it releases
    the interpreter lock while it does, so this thread can still speak and act.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()
        self._verdict = (1, "")
        self._end: Callable[[int, str], object] = _say_and_leave
        self._cancelled = threading.Event()
        threading.Thread(target=self._watch, name="join-watchdog", daemon=True).start()

    @property
    def waited(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds until the deadline (without the grace); negative once it has passed."""
        return self.seconds - self.waited

    @property
    def progress(self) -> str:
        """`20 s of 300 s`."""
        return f"{self.waited:.0f} s of {self.seconds:g} s"

    def expect(self, *, status: int, line: str) -> None:
        """Sets what is said, and the exit status, should the deadline pass from here on."""
        self._verdict = (status, line)

    def hand_over(self, end: Callable[[int, str], object]) -> None:
        """From here on it is `end` that is called with exit status and line, to end the process."""
        self._end = end

    def cancel(self) -> None:
        """What the deadline was for is done."""
        self._cancelled.set()

    def _watch(self) -> None:
        if not self._cancelled.wait(self.seconds + GRACE_SECONDS):
            self._end(*self._verdict)


def _say_and_leave(status: int, line: str) -> None:
    report_line(line)
    exit_process(status)
