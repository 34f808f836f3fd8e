"""Streams that move messages during the computation: CUDA streams, or threads for host tensors."""

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
        """Returns whether all calls before this point are done (or have failed); does not wait."""

    def block_compute(self) -> None:
        """Delays computation that is queued after this call until the stream reaches this point.

        An event of a HostStream raises the error of the first earlier call that failed.
        """


class Stream(Protocol):
    """A queue of calls that run in order, at the same time as the computation."""

    @property
    def pointer(self) -> int:
        """Returns the stream's address, for a C library; 0 for a host stream."""

    def wait_for_compute(self, tensor: Tensor) -> None:
        """Makes later calls wait until the queued computation has written `tensor`."""

    def submit(self, call: Callable[[], None]) -> None:
        """Queues `call` after earlier calls; on a GPU, `call` must use the stream at `pointer`."""

    def record_event(self) -> Event:
        """Returns the point after all calls that were submitted so far."""

    def close(self) -> None:
        """Waits until all calls are done; no call can be submitted afterwards."""


def create_stream(device: torch.device) -> Stream:
    """Returns a new stream on `device`."""
    return CudaStream(device) if device.type == "cuda" else HostStream()


class CudaStream:
    """A CUDA stream; `block_compute` of its events blocks the current stream and not the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @property
    def pointer(self) -> int:
        return int(self._stream.cuda_stream)

    def wait_for_compute(self, tensor: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._stream)  # keeps the memory until the message is done

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
    """A worker thread that runs the calls; `block_compute` of its events blocks the calling thread.

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
        """Does nothing, because the host has already computed `tensor`."""

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
            del item  # releases the tensor before the wait for the next call


class _HostEvent(Future[None]):
    """A point in a host stream; it holds the exception of the first earlier call that failed."""

    def is_done(self) -> bool:
        return self.done()

    def block_compute(self) -> None:
        self.result()
