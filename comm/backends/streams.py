"""Streams that move messages during the computation: CUDA streams, or threads for host tensors."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Blocks this thread until all calls before this point are done or have failed.

        Meanwhile other threads of Python run, even if CUDA never answers.
        """

    def block_compute(self) -> None:
        """Delays computation that is queued after this call until the stream reaches this point.

        An event of a HostStream raises the error of the first earlier call that failed.
        """


class Stream(Protocol):
    """A queue of calls that run in order, at the same time as the computation."""

    @property
    def pointer(self) -> int:
        """Returns the stream's address, for a C library; 0 for a host stream."""

    def wait_for_compute(self) -> None:
        """Makes later calls wait for the computation that is queued so far.

        The caller keeps the tensors of the calls alive until `block_compute` of a later event.
        """

    def submit(self, call: Callable[[], None]) -> None:
        """Queues `call` after earlier calls; on a GPU, `call` must use the stream at `pointer`."""

    def record_event(self) -> Event:
        """Returns the point after all calls that were submitted so far."""

    def close(self) -> None:
        """Waits until all calls are done; no call can be submitted afterwards."""


def create_stream(device: torch.device) -> Stream:
    """Returns a new stream on `device`."""
    return CudaStream(device) if device.type == "cuda" else HostStream()


def compute_event(device: torch.device) -> Event:
    """Returns the point after all computation on `device` that is queued so far."""
    if device.type == "cuda":
        return _CudaEvent.record(torch.cuda.current_stream(device), device)
    event = _HostEvent()
    event.set_result(None)
    return event


class CudaStream:
    """A CUDA stream; `block_compute` of its events blocks the current stream and not the host.

    It has high priority: messages do not share a hardware queue with the computation, and a kernel
    that sends starts before the next kernel of the computation.

    `torch.Tensor.record_stream` would keep the tensors of the calls alive, but it is not used: near
    the memory limit the allocator waits on the host for the recorded tensors, and a receive that
    was posted early may end only after work that the host has not queued yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    @property
    def pointer(self) -> int:
        return int(self._stream.cuda_stream)

    def wait_for_compute(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def submit(self, call: Callable[[], None]) -> None:
        call()

    def record_event(self) -> Event:
        return _CudaEvent.record(self._stream, self._device)

    def close(self) -> None:
        self._stream.synchronize()


@dataclass(frozen=True)
class _CudaEvent:
    event: torch.cuda.Event
    device: torch.device

    @classmethod
    def record(cls, stream: torch.cuda.Stream, device: torch.device) -> "_CudaEvent":
        """Returns the point that `stream` has reached when its queued work is done."""
        return cls(stream.record_event(torch.cuda.Event(blocking=True)), device)

    def synchronize(self) -> None:
        self.event.synchronize()  # unlike `query`, it releases Python's lock

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

    def wait_for_compute(self) -> None:
        """Does nothing, because the host has already computed all tensors."""

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

    def synchronize(self) -> None:
        self.exception()

    def block_compute(self) -> None:
        self.result()
