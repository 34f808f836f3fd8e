"""File I/O that all ranks do at the same time; an error of one rank is returned on all ranks.

Slow disk I/O may take longer than --dist-timeout, the time limit of one operation between ranks. So
the I/O runs in a thread, and every second each rank tells all ranks whether its I/O is done.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable

from comm.communicator import Communicator
from comm.objects import gather_json

logger = logging.getLogger(__name__)

EXCHANGE_SECONDS = 1.0  # after this time the ranks tell each other again whether they are done
SLOW_SECONDS = 60.0  # until the first report of slow ranks; the next report is after twice the time


class BackgroundTask:
    """A function running in a daemon thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Waits until the function has returned or failed."""
        self._thread.join()

    def done(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds; returns whether the function has ended.

        Raises the function's error.
        """
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return self.has_ended

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again in the thread that waits
            self._error = error


def run_on_all(
    control: Communicator,
    work: Callable[[], None] | BackgroundTask | None,
    name: str,
    *,
    expected: type[Exception] | tuple[type[Exception], ...] = OSError,
    exchange_seconds: float = EXCHANGE_SECONDS,
    slow_seconds: float = SLOW_SECONDS,
) -> str | None:
    """Runs `work`, or waits for a running task, and returns when every rank is done.

    Every rank calls this function.

    Args:
        work: a function or a running task; None if this rank has nothing to do.
        name: the name of the work in the log, which reports slow ranks.
        expected: types of errors that are returned on all ranks; an error of another type is raised
            on the rank where it occurs.

    Returns:
        The first expected error with its rank and host, the same on all ranks; None if no rank had
        such an error.
    """
    task = work if work is None or isinstance(work, BackgroundTask) else BackgroundTask(work)
    done, failure = task is None, None
    began, next_report = time.monotonic(), slow_seconds
    while True:
        try:
            done = task is None or task.done(exchange_seconds)
        except expected as error:
            task, done = None, True
            where = f"rank {control.rank} on {socket.gethostname()}: " if control.size > 1 else ""
            failure = f"{where}{error}"
        states = gather_json(control, [done, failure])
        pending = [f"rank {rank}" for rank, (is_done, _) in enumerate(states) if not is_done]
        if not pending:
            return next((error for _, error in states if error), None)
        seconds = time.monotonic() - began
        if control.rank == 0 and seconds > next_report:
            next_report = 2 * seconds
            logger.warning("%s: slow: %s not done after %.0f s", name, ", ".join(pending), seconds)
