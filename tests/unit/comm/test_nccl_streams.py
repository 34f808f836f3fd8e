"""Tests CuPy/NCCL in one process: a communicator's first message, call order and hang reports."""

import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from cupy.cuda import nccl
from torch.distributed import HashStore  # type: ignore[attr-defined]

from comm.backends.cupy_nccl import NcclCommunicator
from comm.backends.streams import Event, HostStream
from comm.communicator import PeerLostError, Work
from tests.support.nccl_double import NcclDouble, Told, nccl_double, open_channel


def open_all(size: int, **options: Any) -> list[tuple[NcclCommunicator, Told]]:
    """Opens the communicators of `size` ranks; returns each with the queue of its hang reports."""
    store = HashStore()
    with ThreadPoolExecutor(size) as pool:
        ranks = range(size)
        return list(pool.map(lambda r: open_channel(store, rank=r, size=size, **options), ranks))


@pytest.mark.parametrize(
    ("pairs", "options"),
    [(2, {"connect_all": False}), (0, {"connect_neighbours": False}), (2, {})],
)
def test_every_communicator_has_carried_a_message_before_it_is_used(
    pairs: int, options: dict[str, bool]
) -> None:
    """Opening a communicator sends a message on it, because the first message blocks both ends."""
    used = queue.SimpleQueue[tuple[str, bytes]]()

    class Noting(NcclDouble):
        def __init__(self, ndev: int, commId: bytes, rank: int) -> None:
            super().__init__(ndev, commId, rank, traffic=Counter())
            self._name = commId
            made.append(commId)

        def _give(self, *args: Any) -> None:
            used.put(("give", self._name))
            super()._give(*args)

        def _take(self, *args: Any) -> None:
            used.put(("take", self._name))
            super()._take(*args)

    made: list[bytes] = []
    with patch.object(nccl, "NcclCommunicator", Noting):
        open_all(3, **options)
    calls = [used.get_nowait() for _ in range(used.qsize())]
    members = 3 * options.get("connect_all", True)
    assert len(made) == members + 2 * 2 * pairs, "one for all, two for each pair, at each end"
    for name in set(made):
        assert {call for call, one in calls if one == name} == {"give", "take"}


def test_a_message_that_nobody_sends_is_reported_with_its_peer() -> None:
    """If rank 1 waits for rank 2 and only rank 0 sends, the report names rank 2."""
    with nccl_double():
        opened = open_all(3, dist_timeout=1.0)
    (first, _), (middle, told), _ = opened
    first.send(torch.zeros(1), to=1).wait()
    wrong = middle.receive(torch.zeros(1), source=2)
    threading.Thread(target=_wait_in_vain, args=(wrong,), daemon=True).start()
    text = str(told.get(timeout=20.0))
    assert text.startswith("pipeline receive from rank 2 (stage 2, replica 0) took more than 1 s")


def _wait_in_vain(work: Work) -> None:
    with suppress(PeerLostError):  # when the test ends and the members close
        work.wait()


def test_a_failure_that_nccl_knows_of_ends_a_message_that_never_ends() -> None:
    """The hang detector asks NCCL for errors and reports one even if the stream still waits."""
    with nccl_double():
        opened = open_all(2)
    channel, told = opened[1]  # keep the other rank alive, or the message would fail
    waiting = channel.receive(torch.zeros(1), source=0)
    channel._edges[0, 1].nccl._failed = True
    threading.Thread(target=_wait_in_vain, args=(waiting,), daemon=True).start()
    text = str(told.get(timeout=20.0))
    assert text.startswith("pipeline receive from rank 0 (stage 0, replica 0) failed after")
    assert "the communicator has failed" in text


class NotingStream(HostStream):
    """A host stream that appends the name of each called method to `calls`."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls

    def wait_for_compute(self) -> None:
        self._calls.append("wait_for_compute")
        super().wait_for_compute()

    def submit(self, call: Callable[[], None]) -> None:
        self._calls.append("submit")
        super().submit(call)

    def record_event(self) -> Event:
        self._calls.append("record_event")
        return super().record_event()


def test_a_tensor_is_ready_before_the_call_that_uses_it() -> None:
    """An operation first calls wait_for_compute, which on a GPU waits until the tensor is ready."""
    calls: list[str] = []
    tensor = torch.zeros(3)
    with (
        nccl_double(),
        patch("comm.backends.cupy_nccl.create_stream", lambda device: NotingStream(calls)),
    ):
        (sender, _), (receiver, _) = open_all(2)
        order = ["wait_for_compute", "submit", "record_event"]
        calls.clear()
        sent = sender.send(tensor, to=1)
        assert calls == order
        calls.clear()
        received = receiver.receive(tensor, source=0)
        assert calls == order
        received.wait()
        sent.wait()


class QueuedStream:
    """A stream like a CUDA stream: a call returns at once, and its message lasts until `ended`."""

    pointer = 0

    def __init__(self, ended: threading.Event) -> None:
        self._ended = ended

    def wait_for_compute(self) -> None:
        """Does nothing."""

    def submit(self, call: Callable[[], None]) -> None:
        call()

    def record_event(self) -> "QueuedStream":
        return self

    def block_compute(self) -> None:
        """Returns at once."""

    def synchronize(self) -> None:
        self._ended.wait()

    def close(self) -> None:
        self.synchronize()


def test_a_work_holds_its_tensors_until_the_wait_and_no_longer() -> None:
    """A message that is queued on a GPU keeps its tensors; a wait releases them.

    `record_stream` kept them before. Near the memory limit the allocator then waited on the host
    for a receive that was posted ahead, whose sender waited for this host. The hang detector still
    watches the message after `wait`, and the caller still has the Work; both must not keep memory.
    """
    ended = threading.Event()
    with (
        patch.object(nccl, "NcclCommunicator"),
        patch("comm.backends.cupy_nccl.create_stream", lambda device: QueuedStream(ended)),
    ):
        channel, _ = open_channel(Mock(get=lambda key: b"00" * 128), rank=0, size=2)
        for start in (
            lambda tensor: channel.send(tensor, to=1),
            lambda tensor: channel.receive(tensor, source=1),
            channel.all_reduce,
            lambda tensor: channel.reduce(tensor, root=1),
        ):
            tensor = torch.ones(3)
            alive = weakref.ref(tensor)
            work = start(tensor)
            del tensor
            assert alive() is not None, "the GPU still needs the memory"
            work.wait()
            assert alive() is None
        assert channel._hang_detector._pending, "the messages have not ended"
        ended.set()
        channel.close()
