"""Streams for messages beside the computation: CUDA's, or a worker thread for host tensors."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream."""

    def is_done(self) -> bool:
        """Returns whether all calls before it are done (or have failed); does not wait."""

    def block_compute(self) -> None:
        """Makes the computation that is queued from now on wait for this point.

        Raises the error of an earlier call, if the stream knows of one.
        """


class Stream(Protocol):
    """A stream runs its calls in order, beside the computation."""

    @property
    def pointer(self) -> int:
        """The stream for a C library."""

    def wait_for_compute(self, tensor: Tensor) -> None:
        """Makes later calls see `tensor` as the computation queued so far leaves it."""

    def submit(self, call: Callable[[], None]) -> None:
        """Runs `call`, which works on `pointer`'s stream, after all calls submitted before."""

    def record_event(self) -> Event:
        """Returns the point after all calls submitted so far."""

    def close(self) -> None:
        """Returns when all calls are done; no more can be submitted."""


def create_stream(device: torch.device) -> Stream:
    """Returns a new stream on `device`."""
    return CudaStream(device) if device.type == "cuda" else HostStream()


class CudaStream:
    """A CUDA stream. The host only queues: `block_compute` blocks the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @property
    def pointer(self) -> int:
        return int(self._stream.cuda_stream)

    def wait_for_compute(self, tensor: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._stream)  # its memory is not reused while a message needs it

    def submit(self, call: Callable[[], None]) -> None:
        call()

    def record_event(self) -> Event:
        return _CudaEvent(self._stream.record_event(), self._device)

    def close(self) -> None:
        self._stream.synchronize()


@dataclass(frozen=True)
class _CudaEvent:
    event: torch.cuda.Event
    device: torch.device

    def is_done(self) -> bool:
        return bool(self.event.query())

    def block_compute(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


class HostStream:
    """A worker thread. `block_compute` blocks the calling thread, which computes.

    After a call has failed, no later call runs, and every later event raises the same error.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | _HostEvent | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="host-stream", daemon=True)
        self._worker.start()

    @property
    def pointer(self) -> int:
        return 0

    def wait_for_compute(self, tensor: Tensor) -> None:
        """The host computes at once: nothing is left to wait for."""

    def submit(self, call: Callable[[], None]) -> None:
        self._queue.put(call)

    def record_event(self) -> Event:
        event = _HostEvent()
        self._queue.put(event)
        return event

    def close(self) -> None:
        self._queue.put(None)
        self._worker.join()

    def _work(self) -> None:
        failure: Exception | None = None
        while (item := self._queue.get()) is not None:
            if isinstance(item, _HostEvent):
                item.set_exception(failure)
            elif failure is None:
                try:
                    item()
                except Exception as error:
                    failure = error
            del item  # and with it the tensor, before the next one is awaited


class _HostEvent(Future[None]):
    """The result of all calls before it: the exception of one that has failed, if any."""

    def is_done(self) -> bool:
        return self.done()

    def block_compute(self) -> None:
        self.result()
