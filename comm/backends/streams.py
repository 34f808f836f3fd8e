"""A side lane for messages: a CUDA stream, or a worker thread for tensors in host memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a lane."""

    def reached(self) -> bool:
        """Whether nothing before it is left to be done (it may have failed); does not wait."""

    def hold_compute(self) -> None:
        """Lets no computation queued from now on run before it.

        Raises what a call before it raised, where the lane knows of it.
        """


class Stream(Protocol):
    """Calls of one lane run in their order, beside the computation."""

    @property
    def pointer(self) -> int:
        """The stream for a C library."""

    def enter(self, tensor: Tensor) -> None:
        """What is queued next sees `tensor` as the computation queued so far leaves it."""

    def queue(self, call: Callable[[], None]) -> None:
        """Runs `call`, which works on `pointer`'s stream, after all that is queued."""

    def mark(self) -> Event:
        """The point after all that is queued."""

    def close(self) -> None:
        """Returns when all that is queued is done; nothing more can be queued."""


def lane_on(device: torch.device) -> Stream:
    """A new lane on `device`."""
    return CudaStream(device) if device.type == "cuda" else HostStream()


class CudaStream:
    """A CUDA stream. The host only queues: `hold_compute` holds the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @property
    def pointer(self) -> int:
        return int(self._stream.cuda_stream)

    def enter(self, tensor: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._stream)  # its memory is not reused while a message needs it

    def queue(self, call: Callable[[], None]) -> None:
        call()

    def mark(self) -> Event:
        return _CudaEvent(self._stream.record_event(), self._device)

    def close(self) -> None:
        self._stream.synchronize()


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def reached(self) -> bool:
        return bool(self._event.query())

    def hold_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class HostStream:
    """One worker thread. `hold_compute` holds the thread that calls it, which is what computes.

    Once a call has failed no later one is run: every later point fails alike.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | _HostEvent | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="host-lane", daemon=True)
        self._worker.start()

    @property
    def pointer(self) -> int:
        return 0

    def enter(self, tensor: Tensor) -> None:
        """The host computes at once: nothing is left to wait for."""

    def queue(self, call: Callable[[], None]) -> None:
        self._queue.put(call)

    def mark(self) -> Event:
        mark = _HostEvent()
        self._queue.put(mark)
        return mark

    def close(self) -> None:
        self._queue.put(None)
        self._worker.join()

    def _work(self) -> None:
        failure: Exception | None = None
        while (item := self._queue.get()) is not None:
            if isinstance(item, _HostEvent):
                item.reach(failure)
            elif failure is None:
                failure = _failure_of(item)
            del item  # and with it the tensor, while the next one is awaited


def _failure_of(call: Callable[[], None]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


class _HostEvent:
    def __init__(self) -> None:
        self._reached = threading.Event()
        self._failure: Exception | None = None

    def reach(self, failure: Exception | None) -> None:
        """All before it is done, or has failed."""
        self._failure = failure
        self._reached.set()

    def reached(self) -> bool:
        return self._reached.is_set()

    def hold_compute(self) -> None:
        self._reached.wait()
        if self._failure is not None:
            raise self._failure
