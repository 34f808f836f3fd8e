"""Channels over NCCL, reached through CuPy: tensors go from GPU to GPU. (Not yet run on a GPU.)

On tensors in host memory all but NCCL's own communicator runs as it does on a GPU, in threads
instead of streams: tests put a double in place of that one class.

A pipeline stage's activation and its neighbour's gradient travel at the same time. On one NCCL
communicator each would wait for the other's end, so every direction between two neighbours has
a communicator of two and a stream of its own. NCCL connects two members at the first message
between them, which holds the host until the other end has called, too: a receive posted ahead would
wait for ever for a sender that waits likewise. So every communicator carries one message as it is
opened, in one order for all members. Pairs that are no neighbours are opened at their first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from comm.backends.base import GroupMembership
from comm.backends.hang_detector import HangDetector
from comm.backends.streams import Event, Stream, lane_on
from comm.communicator import CurrentOperation, Done, PeerLostError, Work
from comm.topology import Topology

# ncclDataType_t of nccl.h; bool travels as its byte
DTYPE_CODES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.bool: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
_SUM = 0  # ncclRedOp_t


@dataclass(frozen=True)
class _Channel:
    """An NCCL communicator (`cupy.cuda.nccl.NcclCommunicator`) and the lane that it runs in."""

    nccl: Any
    lane: Stream


class NcclCommunicator(GroupMembership):
    """A Communicator over NCCL.

    name, members: see Membership.
    store: where the first member of a channel leaves NCCL's unique id for the others.
    dist_timeout, on_hang: a message waited for longer than so many seconds is reported there.
    is_chain: neighbours will exchange messages, so that their channels are opened at once.

    Raises:
        ValueError: CuPy or its NCCL is not installed.
        PeerLostError: a channel could not be made.
    """

    def __init__(
        self,
        *,
        name: str,
        members: Sequence[int],
        topology: Topology,
        device: torch.device,
        store: Store,
        activity: CurrentOperation,
        dist_timeout: float,
        on_hang: Callable[[PeerLostError], object],
        is_chain: bool,
    ) -> None:
        self._library = load_library()
        super().__init__(name=name, members=members, topology=topology)
        self._device = device
        self._store = store
        self._activity = activity
        self._monitor = HangDetector(limit=dist_timeout, on_hang=on_hang)
        self._edges: dict[tuple[int, int], _Channel] = {}
        self._all = self._open("all", range(self.size))
        if self.size > 1:
            self.all_reduce(self._scratch()).wait()
        for left in range(self.size - 1 if is_chain else 0):  # one order: none waits in a ring
            if self._rank in (left, left + 1):
                self._open_pair(left, left + 1)

    def send(self, tensor: Tensor, *, to: int) -> Work:
        channel = self._edge(self._rank, to)
        return self._run(
            f"send to {self._peers[to]}",
            channel,
            tensor,
            lambda *message: channel.nccl.send(*message, 1, channel.lane.pointer),
        )

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        channel = self._edge(source, self._rank)
        return self._run(
            f"receive from {self._peers[source]}",
            channel,
            tensor,
            lambda *message: channel.nccl.recv(*message, 0, channel.lane.pointer),
        )

    def all_reduce(self, tensor: Tensor) -> Work:
        """NCCL chooses the order of the sum."""
        assert tensor.dtype != torch.bool
        nccl, stream = self._all.nccl, self._all.lane.pointer
        return self._run(
            f"all-reduce with {self._others}",
            self._all,
            tensor,
            lambda data, *kind: nccl.allReduce(data, data, *kind, _SUM, stream),
        )

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        """NCCL chooses the order of the sum."""
        assert tensor.dtype != torch.bool
        nccl, stream = self._all.nccl, self._all.lane.pointer
        return self._run(
            f"reduce to {self._peers[root]} with {self._others}",
            self._all,
            tensor,
            lambda data, *kind: nccl.reduce(data, data, *kind, _SUM, root, stream),
        )

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        nccl, stream = self._all.nccl, self._all.lane.pointer
        self._run(
            f"broadcast from {self._peers[root]}",
            self._all,
            tensor,
            lambda data, *kind: nccl.broadcast(data, data, *kind, root, stream),
        ).wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        self._all.lane.enter(gathered)
        nccl, stream = self._all.nccl, self._all.lane.pointer
        self._run(
            f"all-gather with {self._others}",
            self._all,
            tensor,
            lambda data, *kind: nccl.allGather(data, gathered.data_ptr(), *kind, stream),
        ).wait()
        return gathered

    def close(self) -> None:
        channels = (*self._edges.values(), self._all)
        for channel in channels:  # still watched
            channel.lane.close()
        self._monitor.close()
        for channel in channels:
            channel.nccl.destroy()

    def _run(self, what: str, channel: _Channel, tensor: Tensor, call: Callable[..., None]) -> Work:
        """Queues `call(pointer, count, dtype code)` in the channel's lane."""
        assert tensor.is_contiguous()
        if tensor.numel() == 0:
            return Done()
        what = f"{self._name} {what}"

        def guarded() -> None:
            try:
                call(tensor.data_ptr(), tensor.numel(), DTYPE_CODES[tensor.dtype])
            except self._library.NcclError as error:
                raise PeerLostError(f"{what} failed: {error}.") from error

        channel.lane.enter(tensor)
        with self._activity.during(what):
            channel.lane.queue(guarded)
        mark = channel.lane.mark()
        watch = partial(self._monitor.add, what, mark, channel.nccl.check_async_error)
        return _Queued(what, mark, watch, self._activity)

    def _edge(self, source: int, to: int) -> _Channel:
        """The channel of messages from one member to another."""
        if (source, to) not in self._edges:
            self._open_pair(min(source, to), max(source, to))
        return self._edges[source, to]

    def _open_pair(self, left: int, right: int) -> None:
        """Both directions between two members, whichever is wanted first at either end."""
        for source, to in ((left, right), (right, left)):
            self._edges[source, to] = self._open("edge", (source, to))
            if self._rank == source:
                self.send(self._scratch(), to=to).wait()
            else:
                self.receive(self._scratch(), source=source).wait()

    def _scratch(self) -> Tensor:
        return torch.zeros(1, device=self._device)

    def _open(self, kind: str, members: Sequence[int]) -> _Channel:
        """A communicator of `members` (indices in the group), who all call this.

        `kind` tells the group from an edge between the same two.
        """
        ranks = [self._members[member] for member in members]
        key = f"nccl/{self._name}/{kind}/{'-'.join(map(str, ranks))}"
        try:
            if members[0] == self._rank:
                made = self._library.get_unique_id()
                self._store.set(key, bytes(number & 255 for number in made).hex())
            unique_id = bytes.fromhex(self._store.get(key).decode())
            nccl = self._new(len(ranks), unique_id, list(members).index(self._rank))
        except (self._library.NcclError, DistError) as error:
            peers = ", ".join(self._peers[member] for member in members)
            raise PeerLostError(
                f"{self._name}: no NCCL channel between {peers}: {error}."
            ) from error
        return _Channel(nccl, lane_on(self._device))

    def _new(self, size: int, unique_id: bytes, rank: int) -> Any:
        try:
            return self._library.NcclCommunicator(size, unique_id, rank)
        except TypeError:  # CuPy before 14 wants a tuple of signed numbers
            numbers = tuple(number - 256 if number > 127 else number for number in unique_id)
            return self._library.NcclCommunicator(size, numbers, rank)


class _Queued:
    """A message in its lane: on a GPU, waiting holds what it computes next, not the host."""

    def __init__(
        self, what: str, mark: Event, watch: Callable[[], None], activity: CurrentOperation
    ) -> None:
        self._what = what
        self._mark = mark
        self._watch = watch
        self._activity = activity

    def wait(self) -> None:
        self._watch()
        with self._activity.during(self._what):
            self._mark.hold_compute()


def load_library() -> Any:
    """The module `cupy.cuda.nccl`.

    Raises:
        ValueError: it is not installed; the text says what to install.
    """
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ValueError(
            f"--dist-backend cupy_nccl: {error}; install CuPy and NCCL for your CUDA version: "
            "`pip install cupy-cuda12x nvidia-nccl-cu12` or `pip install cupy-cuda13x "
            "nvidia-nccl-cu13`, or use --dist-backend nccl (torch's own), or gloo for it and for "
            "--dp-backend"
        ) from None
    if not nccl.available:
        raise ValueError(
            "--dist-backend cupy_nccl: this CuPy has no NCCL; `pip install nvidia-nccl-cu12` (or "
            "-cu13, as your CUDA version is)"
        )
    return nccl
