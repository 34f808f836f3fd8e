"""A time limit for messages that are queued on a device.

Two threads check the limit, because a question to CUDA may wait for ever: while a receive waits for
its peer, the first launch of a kernel can hold the lock of the CUDA context, and every other call
waits for this lock (CUDA programming guide, "Lazy Loading"; meta-pytorch/torchcomms issue 2334).
One thread waits for the messages in CUDA. The other thread only reads the clock and NCCL's errors.

The first thread calls `Event.synchronize`. It must not poll: torch's `Event.query` and
`Work.is_completed` hold Python's lock (torch/csrc/cuda/Event.cpp), so a question that CUDA does not
answer would stop all threads of Python, and also the thread with the clock.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from comm.backends.nccl_errors import describe
from comm.backends.streams import Event
from comm.communicator import PeerLostError

_CHECK_SECONDS = 0.25


@dataclass(eq=False)
class _Message:
    """A message whose end nobody has seen yet; it holds no tensor."""

    operation: str
    check: Callable[[], None]
    since: float
    failure: Exception | None = None


def _no_check() -> None:
    """Finds no failure."""


class HangDetector:
    """The threads that limit how long messages take.

    limit: the longest time in seconds from the start of the wait to the end of the message.
    on_hang: a thread calls it once, for the first message that takes longer or fails.
    device: the device of the messages.
    check_seconds: the interval of the checks.
    """

    def __init__(
        self,
        *,
        limit: float,
        on_hang: Callable[[PeerLostError], object],
        device: torch.device,
        check_seconds: float = _CHECK_SECONDS,
    ) -> None:
        self._limit, self._on_hang, self._device = limit, on_hang, device
        self._check_seconds = check_seconds
        self._pending: list[_Message] = []
        self._queued: queue.SimpleQueue[tuple[_Message, Event] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        for work, name in ((self._await_ends, "message-ends"), (self._check, "hang-detector")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def watch(
        self, operation: str, block: Callable[[], Event], *, check: Callable[[], None] = _no_check
    ) -> None:
        """Calls `block`, and limits the time from now to the event that `block` returns.

        Args:
            operation: the name of the message, for the error.
            block: starts the wait for the message. It may block this thread; a thread that hangs
                in `block` is reported too.
            check: raises an error if the library reports a failure of the message. A thread calls
                it until the message ends. It must not call CUDA.
        """
        message = _Message(operation, check, time.monotonic())
        self._pending.append(message)
        try:
            event = block()
        except BaseException:
            self._pending.remove(message)
            raise
        self._queued.put((message, event))

    def close(self) -> None:
        """Ends the checks."""
        self._closed.set()
        self._queued.put(None)

    def _await_ends(self) -> None:
        """Removes messages that have ended, in the order of the waits."""
        if self._device.type == "cuda":  # a thread begins on GPU 0, and would use memory there
            torch.cuda.set_device(self._device)
        while (item := self._queued.get()) is not None:
            message, event = item
            try:
                event.synchronize()
                self._pending.remove(message)
            except Exception as error:
                message.failure = error
            del item, message, event

    def _check(self) -> None:
        while not self._closed.wait(self._check_seconds):
            problem = self._problem()
            if problem is not None and not self._closed.is_set():
                self._on_hang(problem)
                return

    def _problem(self) -> PeerLostError | None:
        """Returns the error of the first message that failed or takes too long; calls no CUDA."""
        for message in tuple(self._pending):
            waited = time.monotonic() - message.since
            try:
                if message.failure is not None:
                    raise message.failure
                message.check()
            except Exception as error:  # CuPy also raises KeyError
                reason = describe(error)
                return PeerLostError(f"{message.operation} failed after {waited:.1f} s: {reason}.")
            if waited > self._limit:
                return PeerLostError(
                    f"{message.operation} took more than {waited:.0f} s (--dist-timeout)."
                )
        return None
