"""Work on files that the processes of a run do side by side, whose failures all of them hear of.

A disk may take longer than --dist-timeout lets a process wait for another. So the work goes on in a
thread, and the processes tell each other every second that they are still at it.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from comm.communicator import Communicator
from comm.objects import gather_json

logger = logging.getLogger(__name__)

TELL_SECONDS = 1.0
SLOW_SECONDS = 60.0


class BackgroundTask:
    """Work in a thread, which does not keep the process from ending."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether it is done, or has failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it has ended, well or not."""
        self._thread.join()

    def done(self, timeout: float) -> bool:
        """Whether it has ended within `timeout` seconds; raises what it raised."""
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again in the thread that waits
            self._error = error


def run_on_all(
    control: Communicator,
    work: Callable[[], None] | BackgroundTask | None,
    what: str,
    *,
    expected: type[Exception] | tuple[type[Exception], ...] = OSError,
) -> str | None:
    """Does `work`, or waits for it where it goes on already, and returns once every process has
    done its own; None is nothing to do.

    Every process calls it. Where `work` raised `expected` anywhere, all get the first such failure
    in words: which rank, on which host, and what. Another error is raised where it happened. Where
    it takes long, the log says at which ranks: `what` are the words for the work.
    """
    task = work if work is None or isinstance(work, BackgroundTask) else BackgroundTask(work)
    done, failure, slow = task is None, None, _Slowness(what)
    while True:
        try:
            done = task is None or task.done(TELL_SECONDS)
        except expected as error:
            task, done = None, True
            where = f"rank {control.rank} on {socket.gethostname()}: " if control.size > 1 else ""
            failure = f"{where}{error}"
        states = gather_json(control, [done, failure])
        waiting = [rank for rank, (is_done, _) in enumerate(states) if not is_done]
        if not waiting:
            return next((words for _, words in states if words), None)
        if control.rank == 0:
            slow.tell(waiting)


class _Slowness:
    """Says that a disk is slow, when that has lasted a while, and again when twice as long."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._next = what, time.monotonic(), SLOW_SECONDS

    def tell(self, ranks: list[int]) -> None:
        seconds = time.monotonic() - self._began
        if seconds > self._next:
            self._next = 2 * seconds
            names = ", ".join(f"rank {rank}" for rank in ranks)
            logger.warning("%s: slow: %s not done after %.0f s", self._what, names, seconds)
