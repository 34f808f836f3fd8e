"""Double of CUDA's streams and events: threads run the queued work, and copies take some time.

Tensors of the tests are in host memory. `cuda_double` replaces the parts of torch.cuda that
comm.backends.copy_stream uses. So the class for a GPU runs, and a test sees a wait that is missing:
without it, a thread reads a tensor before the delayed copy has written it.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from comm.backends.host_staging import HostStagingCommunicator
from comm.backends.streams import HostStream
from comm.communicator import Work

DEVICE = torch.device("cuda", 0)
DEADLINE = 20.0  # seconds until a wait fails, so that no test hangs


class EventDouble:
    """A point in a StreamDouble; a new event is done, as in CUDA."""

    def __init__(self, *, blocking: bool = False) -> None:
        self.reached = threading.Event()
        self.reached.set()

    def query(self) -> bool:
        return self.reached.is_set()

    def synchronize(self) -> None:
        assert self.reached.wait(DEADLINE), "an event of the CUDA double was not reached"


class StreamDouble:
    """A thread that runs queued functions in order."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._thread = HostStream()

    def submit(self, call: Callable[[], object]) -> None:
        """Queues `call` like a kernel: it runs later, in the thread."""
        self._thread.submit(lambda: _ignore(call()))

    def record_event(self, event: EventDouble | None = None) -> EventDouble:
        event = EventDouble() if event is None else event
        event.reached.clear()
        self.submit(event.reached.set)
        return event

    def wait_event(self, event: EventDouble) -> None:
        self.submit(event.synchronize)

    def synchronize(self) -> None:
        self._thread.record_event().block_compute()

    def close(self) -> None:
        self._thread.close()


@dataclass
class CudaDouble:
    """The streams of the double; `compute` is the current stream of every thread.

    devices: the arguments of torch.cuda.set_device, each with the name of the calling thread.
    pinned: the sizes of all pinned allocations, in bytes.
    copy_seconds: how long each copy takes.
    """

    copy_seconds: float
    compute: StreamDouble = field(default_factory=StreamDouble)
    streams: list[StreamDouble] = field(default_factory=list)
    devices: list[tuple[object, str]] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)

    def make_stream(self, device: torch.device) -> StreamDouble:
        self.streams.append(StreamDouble())
        return self.streams[-1]

    def set_device(self, device: object) -> None:
        self.devices.append((device, threading.current_thread().name))

    def pinned_empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        self.pinned.append(tensor.nbytes)
        return tensor

    @contextmanager
    def in_stream(self, stream: StreamDouble) -> Iterator[None]:
        with _DelayedCopies(stream, self.copy_seconds):
            yield


class _DelayedCopies(TorchFunctionMode):
    """A mode in which asynchronous copies are queued in a stream."""

    def __init__(self, stream: StreamDouble, seconds: float) -> None:
        super().__init__()
        self._stream, self._seconds = stream, seconds

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.copy_ or not (kwargs or {}).get("non_blocking"):
            return func(*args, **(kwargs or {}))

        def copy() -> None:
            time.sleep(self._seconds)
            with torch.no_grad():
                func(*args)

        self._stream.submit(copy)
        return args[0]


@contextmanager
def cuda_double(*, copy_seconds: float) -> Iterator[CudaDouble]:
    """Replaces CUDA in the `with` block; afterwards all queued work is done."""
    double = CudaDouble(copy_seconds)
    with (
        patch("torch.cuda.Stream", double.make_stream),
        patch("torch.cuda.Event", EventDouble),
        patch("torch.cuda.current_stream", lambda device: double.compute),
        patch("torch.cuda.stream", double.in_stream),
        patch("torch.cuda.set_device", double.set_device),
        patch("comm.backends.pinned_pool.pinned_empty", double.pinned_empty),
    ):
        yield double
        for stream in (double.compute, *double.streams):
            stream.synchronize()  # raises the error of a failed call
            stream.close()


class Finished:
    """A staging communicator whose operations also wait for the GPU, as a test reads the result."""

    def __init__(self, staging: HostStagingCommunicator, double: CudaDouble) -> None:
        self._staging, self._double = staging, double
        self.rank, self.size = staging.rank, staging.size
        self.all_gather = staging.all_gather

    def send(self, tensor: Tensor, *, to: int) -> Work:
        return _FinishedWork(self._staging.send(tensor, to=to), self._double)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        return _FinishedWork(self._staging.receive(tensor, source=source), self._double)

    def all_reduce(self, tensor: Tensor) -> Work:
        return _FinishedWork(self._staging.all_reduce(tensor), self._double)

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        return _FinishedWork(self._staging.reduce(tensor, root=root), self._double)

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        self._staging.broadcast(tensor, root=root)
        self._double.compute.synchronize()

    def close(self) -> None:
        self._staging.close()


@dataclass(frozen=True)
class _FinishedWork:
    work: Work
    double: CudaDouble

    def wait(self) -> None:
        self.work.wait()
        self.double.compute.synchronize()


def _ignore(_: object) -> None:
    """Does nothing."""
