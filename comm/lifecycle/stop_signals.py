"""Signals that ask this process to stop; a separate thread receives them.

If the main thread hangs in a library, Python does not call handlers that are Python functions. But
Python's own C handler still writes the signal's number to a pipe (signal.set_wakeup_fd). A thread
reads the pipe and enforces the time limit of the stop. The effect of a stop request depends on the
phase of the process.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from comm.lifecycle.exit import report_and_exit
from comm.timing import DEFAULT_TIMING, Timing

STOPPED = 75  # exit status: the run was asked to stop, lost nothing, and is not finished
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TICK_SECONDS = 0.1
_JOIN_SECONDS = 5.0  # for the main thread to inform the other ranks of the stop


class StopCause(NamedTuple):
    """The cause of a stop: the rank that received the signal, and the signal's number."""

    rank: int
    number: int

    def __str__(self) -> str:
        return f"asked to stop ({signal.Signals(self.number).name} on rank {self.rank})"


class StopAskedError(Exception):
    """The error of a stop request that came before all ranks had joined."""


class Phase(NamedTuple):
    """The effect of a stop request during one phase of the process.

    seconds: the time limit of the stop; after it, the listener's thread ends the process.
    status, line: the exit status and the error line if the listener's thread ends the process.
    """

    seconds: float
    status: int
    line: str


NOT_BEGUN = "before training began: nothing to save; start the same command again to continue"
JOINING = Phase(_JOIN_SECONDS, STOPPED, NOT_BEGUN)
LOADING = Phase(0.0, STOPPED, NOT_BEGUN)
CLOSING = Phase(math.inf, STOPPED, "")


def training(grace_seconds: float) -> Phase:
    """Returns the phase of the training loop, which must stop within `grace_seconds`."""
    line = (
        f"{grace_seconds:g} s ago (--grace-seconds): the steps since the last checkpoint are not "
        "saved; the same command resumes from that checkpoint"
    )
    return Phase(grace_seconds, 1, line)


def cleanup(grace_seconds: float) -> Phase:
    """Returns the phase of deleting old checkpoints, after the run's last checkpoint is saved."""
    line = (
        "and ended during cleanup: the last step is saved; some checkpoints beyond "
        "--keep-checkpoints are not deleted yet, a later save deletes them; start the same command "
        "again to continue"
    )
    return Phase(grace_seconds, STOPPED, line)


class StopRequest:
    """The first stop request (`asked`, which is None before it comes) and the current `phase`."""

    def __init__(self) -> None:
        self.asked: StopCause | None = None
        self.phase = JOINING

    def ask(self, asked: StopCause) -> None:
        if self.asked is None:
            self.asked = asked


class StopListener:
    """A listener that records a stop request, and ends this process after the time limit.

    SIGNALS are the signals that request a stop. A signal that the parent process set to ignored
    stays ignored. Only the main thread can construct a listener.
    """

    def __init__(
        self,
        request: StopRequest,
        *,
        rank: int,
        alone: bool,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._same_seconds = timing.same_stop
        self._request, self._rank, self._alone = request, rank, alone
        self._end: Callable[[int, str], object] = self._report_and_exit
        self._forward: Callable[[int], None] = lambda _number: None
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)
        threading.Thread(target=self._listen, name="stop-listener", daemon=True).start()

    def hand_over(
        self, *, end: Callable[[int, str], object], forward: Callable[[int], None]
    ) -> None:
        """Sets two functions: `end` ends the process, and `forward` tells rank 0 of a signal.

        `end` gets the exit status and the error line; `forward` gets the signal's number.
        """
        self._end, self._forward = end, forward

    def _listen(self) -> None:
        while (number := self._read(None)) is None:
            pass
        began, asked = time.monotonic(), StopCause(self._rank, number)
        self._request.ask(asked)
        self._forward(number)
        while True:
            waited, phase = time.monotonic() - began, self._request.phase
            if waited >= phase.seconds:
                self._end(phase.status, f"{asked} {phase.line}")
            again = self._read(_TICK_SECONDS)
            if again is not None and waited > self._same_seconds and phase is not CLOSING:
                self._end(1, f"{asked} and again ({signal.Signals(again).name}): ended at once")

    def _read(self, seconds: float | None) -> int | None:
        """Returns the next signal's number; None if `seconds` pass or it is not in SIGNALS."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return None
        (number,) = os.read(self._pipe, 1)
        return number if number in SIGNALS else None

    def _report_and_exit(self, status: int, line: str) -> None:
        report_and_exit(status, line if self._alone else f"rank {self._rank}: {line}")
