"""Communication of CUDA tensors through copies in pinned host memory; it needs only TCP.

The thread that launches the computation never waits for the GPU. A send starts a copy to the host,
and a worker thread waits for this copy and then starts the send of the host communicator. A receive
starts at once on the host; its `wait` starts the copy to the device, and only the later computation
on the device waits for the copy. (Not yet run on a GPU.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from comm.backends.copy_stream import CopyStream, StreamCopy
from comm.backends.pinned_pool import PinnedBuffer, PinnedPool
from comm.backends.streams import HostStream
from comm.communicator import Communicator, Done, Work


class HostStagingCommunicator:
    """A Communicator for tensors on `device`; `host` is a Communicator for host tensors.

    The worker thread starts all operations but receives, in the order of the calls, so the order is
    the same on all members. After an operation could not be started, no later operation is started:
    otherwise a peer could take a later message for the missing one.
    """

    def __init__(self, host: Communicator, device: torch.device) -> None:
        self._host = host
        self._to_host, self._to_device = CopyStream(device), CopyStream(device)
        self._pool = PinnedPool(device)
        self._worker = HostStream()
        if device.type == "cuda":  # a new thread has device 0
            self._worker.submit(partial(torch.cuda.set_device, device))

    @property
    def rank(self) -> int:
        return self._host.rank

    @property
    def size(self) -> int:
        return self._host.size

    def send(self, tensor: Tensor, *, to: int) -> Work:
        return self._start(tensor, partial(self._host.send, to=to))

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        buffer = self._pool.take(tensor)
        work = self._host.receive(buffer.view_like(tensor), source=source)
        return self._staged(work, buffer, target=tensor)

    def all_reduce(self, tensor: Tensor) -> Work:
        return self._start(tensor, self._host.all_reduce, target=tensor)

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        target = tensor if self.rank == root else None
        return self._start(tensor, partial(self._host.reduce, root=root), target=target)

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        def broadcast(copy: Tensor) -> Work:
            self._host.broadcast(copy, root=root)
            return Done()

        target = None if self.rank == root else tensor
        self._start(tensor, broadcast, target=target).wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        rows: list[Tensor] = []

        def gather(copy: Tensor) -> Work:
            rows.append(self._host.all_gather(copy))
            return Done()

        self._start(tensor, gather).wait()
        return rows[0].to(tensor.device)

    def close(self) -> None:
        self._worker.close()
        self._host.close()

    def _start(
        self, tensor: Tensor, operation: Callable[[Tensor], Work], *, target: Tensor | None = None
    ) -> Work:
        """Copies `tensor` to the host; the worker calls `operation` with the complete copy.

        `wait` of the returned Work copies the result to `target`, if it is given.
        """
        buffer = self._pool.take(tensor)
        copy = buffer.view_like(tensor)
        copied = self._to_host.start(copy, tensor, after=self._to_host.record_compute())
        work = _WorkerWork(self._worker, partial(_start_after, copied, operation))
        return self._staged(work, buffer, target=target)

    def _staged(self, work: Work, buffer: PinnedBuffer, *, target: Tensor | None) -> Work:
        deliver = None
        if target is not None:  # the copy to the device need not wait for later computation
            after = self._to_device.record_compute()
            deliver = partial(self._to_device.start, target, buffer.view_like(target), after=after)
        return _StagedWork(work, buffer, self._pool, deliver)


def _start_after(copied: StreamCopy, operation: Callable[[Tensor], Work]) -> Work:
    copied.wait()
    return operation(copied.target)


class _WorkerWork:
    """An operation that the worker thread starts; `wait` raises the error of a failed start."""

    def __init__(self, worker: HostStream, start: Callable[[], Work]) -> None:
        self._works: list[Work] = []
        worker.submit(partial(self._run, start))
        self._started = worker.record_event()

    def wait(self) -> None:
        self._started.block_compute()
        self._works.pop().wait()

    def _run(self, start: Callable[[], Work]) -> None:
        self._works.append(start())


@dataclass
class _StagedWork:
    """An operation on a copy in host memory; `deliver` starts the copy of the result to the device.

    On a GPU, `wait` blocks this thread until the host's operation is complete, and later
    computation on the device until the result is there.
    """

    work: Work
    buffer: PinnedBuffer
    pool: PinnedPool
    deliver: Callable[[], StreamCopy] | None

    def wait(self) -> None:
        self.work.wait()
        if self.deliver is None:
            self.pool.give_back(self.buffer)
            return
        copied = self.deliver()
        copied.block_compute()
        self.deliver = None  # releases the tensor, also if the caller keeps this object
        self.pool.give_back(self.buffer, read=copied.event)
