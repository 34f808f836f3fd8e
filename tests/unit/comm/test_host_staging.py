"""Tests the communicator that sends GPU tensors through pinned memory, with a double of CUDA.

Before, each operation copied through pageable memory in the calling thread. This thread launches
the computation, so the GPU had no work while the thread waited for a copy.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from comm.backends.host_staging import HostStagingCommunicator
from comm.communicator import PeerLostError
from tests.support.cuda_double import DEADLINE, DEVICE, CudaDouble, cuda_double

COPY_SECONDS = 0.01
LOST = "pipeline send to rank 1 failed after 0.0 s (--dist-timeout): Connection closed."


class _HostWork:
    def __init__(self, at_wait: Callable[[], object]) -> None:
        self._at_wait = at_wait

    def wait(self) -> None:
        self._at_wait()


class _Host:
    """A host communicator without peers: `started` lists the operations and their values.

    A received tensor is 7; a sum is twice this member's tensor; a broadcast brings 5.
    """

    rank, size = 0, 2

    def __init__(self) -> None:
        self.started: list[tuple[str, float]] = []
        self.failure: Exception | None = None
        self.closed = False

    def send(self, tensor: Tensor, *, to: int) -> _HostWork:
        return self._begin(f"send to {to}", tensor, lambda: None)

    def receive(self, tensor: Tensor, *, source: int) -> _HostWork:
        self.started.append((f"receive from {source}", 0.0))
        return _HostWork(lambda: tensor.fill_(7.0))

    def all_reduce(self, tensor: Tensor) -> _HostWork:
        return self._begin("all-reduce", tensor, lambda: tensor.mul_(2))

    def reduce(self, tensor: Tensor, *, root: int) -> _HostWork:
        return self._begin(f"reduce to {root}", tensor, lambda: tensor.mul_(2))

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        self._begin(f"broadcast from {root}", tensor, lambda: None)
        if root != self.rank:
            tensor.fill_(5.0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        self._begin("all-gather", tensor, lambda: None)
        return torch.stack([tensor, tensor + 1])

    def close(self) -> None:
        self.closed = True

    def _begin(self, name: str, tensor: Tensor, at_wait: Callable[[], object]) -> _HostWork:
        if self.failure is not None:
            raise self.failure
        self.started.append((name, tensor.view(-1)[-1].item()))
        return _HostWork(at_wait)


@pytest.fixture
def cuda() -> Iterator[CudaDouble]:
    with cuda_double(copy_seconds=COPY_SECONDS) as double:
        yield double


@pytest.fixture
def host() -> _Host:
    return _Host()


@pytest.fixture
def staging(cuda: CudaDouble, host: _Host) -> Iterator[HostStagingCommunicator]:
    communicator = HostStagingCommunicator(host, DEVICE)
    yield communicator
    communicator.close()
    assert host.closed
    assert "host-stream" not in {t.name for t in _worker_threads(communicator)}, "it has ended"


def _worker_threads(communicator: HostStagingCommunicator) -> list[threading.Thread]:
    worker = communicator._worker._worker
    return [thread for thread in threading.enumerate() if thread is worker]


def queue_gate(cuda: CudaDouble) -> threading.Event:
    """Queues work on the GPU that is done when the returned event is set."""
    gate = threading.Event()
    cuda.compute.submit(lambda: _wait(gate))
    return gate


def _let_copies_run() -> None:
    """Gives a copy that does not wait for the GPU's computation the time to read or write."""
    time.sleep(5 * COPY_SECONDS)


def _wait(event: threading.Event) -> None:
    assert event.wait(DEADLINE), "the test did not open the gate"


def test_sent_are_the_values_that_queued_computation_writes_and_nobody_waits_for_it(
    cuda: CudaDouble, host: _Host, staging: HostStagingCommunicator
) -> None:
    """The GPU is still busy when the calls return, so they did not wait for it."""
    gate, x = queue_gate(cuda), torch.zeros(3)
    cuda.compute.submit(partial(x.fill_, 1.0))
    sent = staging.send(x, to=1)
    total = staging.all_reduce(x)
    _let_copies_run()
    assert host.started == []
    gate.set()
    sent.wait()
    total.wait()
    cuda.compute.submit(partial(x.add_, 1.0))
    cuda.compute.synchronize()
    assert host.started == [("send to 1", 1.0), ("all-reduce", 1.0)]
    assert x.tolist() == [3.0] * 3, "computation after wait() has the sum"


def test_a_received_tensor_arrives_between_computation_before_and_after(
    cuda: CudaDouble, host: _Host, staging: HostStagingCommunicator
) -> None:
    """`wait` does not wait for the GPU, and queued computation that uses the memory is not hurt."""
    gate, x, seen = queue_gate(cuda), torch.zeros(2), list[float]()
    cuda.compute.submit(lambda: seen.append(x.sum().item()))
    work = staging.receive(x, source=1)
    assert host.started == [("receive from 1", 0.0)], "at once"
    work.wait()
    cuda.compute.submit(lambda: seen.append(x.sum().item()))
    _let_copies_run()
    assert seen == []
    gate.set()
    cuda.compute.synchronize()
    assert seen == [0.0, 14.0]


def test_a_received_tensor_does_not_wait_for_computation_that_was_queued_later(
    cuda: CudaDouble, staging: HostStagingCommunicator
) -> None:
    x = torch.zeros(2)
    work = staging.receive(x, source=1)
    gate = queue_gate(cuda)
    work.wait()
    to_device = staging._to_device.start(torch.empty(1), torch.empty(1), after=_done())
    to_device.wait()  # later in the same stream
    assert x.tolist() == [7.0, 7.0]
    gate.set()


def _done() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)


def test_operations_start_in_the_order_of_the_calls(
    cuda: CudaDouble, host: _Host, staging: HostStagingCommunicator
) -> None:
    """A broadcast or a sum never overtakes a send whose copy is still on its way."""
    values = [torch.full((1 + 1000 * (i % 2),), float(i)) for i in range(6)]
    works = [
        staging.send(values[0], to=1),
        staging.reduce(values[1], root=0),
        staging.send(values[2], to=1),
        staging.reduce(values[3], root=1),
    ]
    staging.broadcast(values[4], root=1)
    assert staging.all_gather(values[5]).tolist() == [[5.0] * 1001, [6.0] * 1001]
    for work in reversed(works):
        work.wait()
    cuda.compute.synchronize()
    names = ("send to 1", "reduce to 0", "send to 1", "reduce to 1", "broadcast from 1")
    assert host.started == [(n, float(i)) for i, n in enumerate((*names, "all-gather"))]
    assert [v[0].item() for v in values] == [0.0, 2.0, 2.0, 3.0, 5.0, 5.0]


def test_the_error_of_a_start_comes_back_from_wait_and_nothing_else_is_sent(
    host: _Host, staging: HostStagingCommunicator
) -> None:
    """A peer would take the message after the failed one for the failed one."""
    before, x = staging.send(torch.zeros(1), to=1), torch.ones(1)
    before.wait()
    host.failure = PeerLostError(LOST)
    failed = staging.send(x, to=1)
    with pytest.raises(PeerLostError) as caught:
        failed.wait()
    assert str(caught.value) == LOST
    host.failure = None
    for operation in (partial(staging.send, to=1), staging.all_reduce):
        with pytest.raises(PeerLostError):
            operation(x).wait()
    with pytest.raises(PeerLostError):
        staging.broadcast(x, root=1)
    assert host.started == [("send to 1", 0.0)]


def test_the_worker_uses_the_device_of_its_rank(
    cuda: CudaDouble, staging: HostStagingCommunicator
) -> None:
    """CUDA gives device 0 to a new thread, on which the worker would make a second context."""
    staging.send(torch.zeros(1), to=1).wait()
    assert cuda.devices == [(DEVICE, "host-stream")]


def test_a_tensor_lives_until_it_is_copied_and_no_longer(
    cuda: CudaDouble, staging: HostStagingCommunicator
) -> None:
    gate, x = queue_gate(cuda), torch.ones(3)
    alive, work = weakref.ref(x), staging.send(x, to=1)
    y = torch.ones(3)
    target, received = weakref.ref(y), staging.receive(y, source=1)
    del x, y
    assert alive() is not None, "the copy reads it"
    assert target() is not None
    gate.set()
    work.wait()
    received.wait()
    cuda.compute.synchronize()
    staging.send(torch.ones(1), to=1).wait()  # the worker has forgotten the first send
    assert (alive(), target()) == (None, None), "the caller still holds both works"


def test_buffers_are_used_again_when_no_copy_reads_them(
    cuda: CudaDouble, staging: HostStagingCommunicator
) -> None:
    """The first copy to the device still reads its buffer when the next message comes."""
    gate = queue_gate(cuda)
    tensors = [torch.empty(n) for n in (10, 8)]
    for x in tensors:
        staging.receive(x, source=1).wait()
    assert cuda.pinned == [40, 32], "the first buffer is in use"
    gate.set()
    cuda.compute.synchronize()
    assert all((x == 7).all() for x in tensors)
    for n in (8, 9, 10, 3):
        staging.send(torch.zeros(n), to=1).wait()
        staging.receive(torch.empty(n), source=1).wait()
        cuda.compute.synchronize()
    assert cuda.pinned == [40, 32], "the smallest that is big enough"
