"""A deadline that ends the process even if the main thread hangs inside a library."""

import threading
import time
from collections.abc import Callable

from comm.lifecycle.exit import report_and_exit
from comm.timing import DEFAULT_TIMING


class Deadline:
    """A time limit; unless it is cancelled, its thread ends the process after `seconds` + `grace`.

    torch's TCPStore client can hang longer than its timeout if another program listens at the port.
    The client releases the interpreter lock while it hangs, so the deadline's thread still runs.
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
        """Seconds since this deadline was created."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, without the grace; negative after the deadline."""
        return self.seconds - self.elapsed

    @property
    def progress(self) -> str:
        """Text for log lines: the elapsed time and the limit, such as `20 s of 300 s`."""
        return f"{self.elapsed:.0f} s of {self.seconds:g} s"

    def expect(self, *, status: int, line: str) -> None:
        """Sets the exit status and the error line that are used if the deadline passes."""
        self._verdict = (status, line)

    def hand_over(self, end: Callable[[int, str], object]) -> None:
        """Sets `end(status, line)` as the function that ends the process after the deadline."""
        self._end = end

    def cancel(self) -> None:
        """Cancels the deadline."""
        self._cancelled.set()

    def _wait(self) -> None:
        if not self._cancelled.wait(self.seconds + self._grace):
            self._end(*self._verdict)
