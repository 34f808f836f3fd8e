"""Communicators over NCCL, through CuPy: tensors travel from GPU to GPU. (Not yet run on a GPU.)

Tests use host tensors. A test double replaces CuPy's NCCL communicator, and threads replace CUDA
streams.

Between two neighbouring stages, an activation and a gradient travel at the same time. On one NCCL
communicator the second message would wait until the first is done. So every direction between two
neighbours has its own communicator of two members and its own stream.

NCCL connects two members at their first message, and blocks the host until one member has called
send and the other receive. Two members that both call receive first would wait forever. So every
communicator carries one message when it is opened, and all members open the communicators in the
same order. Only the communicators that a group needs are opened: `connect_neighbours` opens those
for messages, `connect_all` the one for collectives. Members that are not neighbours open their
communicators later, at their first message.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from comm.backends.base import Group, GroupMembership
from comm.backends.hang_detector import HangDetector
from comm.backends.nccl_errors import describe, free_memory
from comm.backends.streams import Event, Stream, create_stream
from comm.communicator import CurrentOperation, Done, PeerLostError, Work

# ncclDataType_t of nccl.h; a bool is sent as one byte
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
    """An NCCL communicator (`cupy.cuda.nccl.NcclCommunicator`) and its stream."""

    nccl: Any
    stream: Stream


class NcclCommunicator(GroupMembership):
    """A Communicator over NCCL, made of channels: NCCL communicators, each with its own stream.

    All members call `connect_neighbours` before the first send to a neighbour, and `connect_all`
    before the first collective. Both raise PeerLostError if a channel cannot be opened.

    store: passes NCCL's unique id from the first member of a channel to the other members.
    on_hang: is called with the error if a message fails or takes longer than `group.dist_timeout`.

    Raises ValueError if CuPy or its NCCL is not installed.
    """

    def __init__(
        self,
        group: Group,
        *,
        device: torch.device,
        store: Store,
        on_hang: Callable[[PeerLostError], object],
    ) -> None:
        super().__init__(group)
        self._library = load_library()
        self._errors = (self._library.NcclError, KeyError)  # KeyError: a result unknown to CuPy
        self._device = device
        self._store = store
        self._hang_detector = HangDetector(limit=group.dist_timeout, on_hang=on_hang, device=device)
        self._edges: dict[tuple[int, int], _Channel] = {}
        self._all_members: _Channel | None = None

    def connect_all(self) -> None:
        """Opens the channel for collectives."""
        self._all_members = self._open("all", range(self.size))
        self.all_reduce(self._scratch()).wait()

    def connect_neighbours(self) -> None:
        """Opens the channels between neighbours, in both directions."""
        for left in range(self.size - 1):  # the same order on all members, so no deadlock
            if self._rank in (left, left + 1):
                self._open_pair(left, left + 1)

    def send(self, tensor: Tensor, *, to: int) -> Work:
        channel = self._edge(self._rank, to)
        return self._run(f"send to {self._peers[to]}", channel, channel.nccl.send, [tensor], 1)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        channel, operation = self._edge(source, self._rank), f"receive from {self._peers[source]}"
        return self._run(operation, channel, channel.nccl.recv, [tensor], 0)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Starts summing `tensor` in place on all members; NCCL chooses the order of the sum."""
        assert tensor.dtype != torch.bool
        call, operation = self._all.nccl.allReduce, f"all-reduce with {self._others}"
        return self._run(operation, self._all, call, [tensor, tensor], _SUM)

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        """Starts summing `tensor` in place on member `root`; NCCL chooses the order of the sum."""
        assert tensor.dtype != torch.bool
        operation = f"reduce to {self._peers[root]} with {self._others}"
        return self._run(operation, self._all, self._all.nccl.reduce, [tensor, tensor], _SUM, root)

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        call, operation = self._all.nccl.broadcast, f"broadcast from {self._peers[root]}"
        self._run(operation, self._all, call, [tensor, tensor], root).wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        call, operation = self._all.nccl.allGather, f"all-gather with {self._others}"
        self._run(operation, self._all, call, [tensor, gathered]).wait()
        return gathered

    def close(self) -> None:
        channels = list(self._edges.values())
        if self._all_members is not None:
            channels.append(self._all_members)
        for channel in channels:  # the hang detector still watches these waits
            channel.stream.close()
        self._hang_detector.close()
        for channel in channels:
            channel.nccl.destroy()

    @property
    def _all(self) -> _Channel:
        assert self._all_members is not None, f"{self._name}: connect_all() was not called"
        return self._all_members

    def _run(
        self,
        operation: str,
        channel: _Channel,
        call: Callable[..., None],
        buffers: Sequence[Tensor],
        *arguments: int,
    ) -> Work:
        """Submits `call(*pointers, count, dtype code, *arguments, stream)` to the channel's stream.

        `pointers` are the addresses of `buffers`; the first buffer gives count and dtype.
        """
        tensor, name = buffers[0], f"{self._name} {operation}"
        assert tensor.is_contiguous()
        if tensor.numel() == 0:
            return Done()

        def guarded() -> None:
            pointers = [buffer.data_ptr() for buffer in buffers]
            kind = tensor.numel(), DTYPE_CODES[tensor.dtype]
            try:
                call(*pointers, *kind, *arguments, channel.stream.pointer)
            except self._errors as error:
                raise PeerLostError(f"{name} failed: {describe(error)}.") from error

        channel.stream.wait_for_compute()
        with self._operation.during(name):
            channel.stream.submit(guarded)
        event, check = channel.stream.record_event(), channel.nccl.check_async_error
        return _NcclWork(name, event, check, self._hang_detector, self._operation, buffers)

    def _edge(self, source: int, to: int) -> _Channel:
        """Returns the channel from member `source` to member `to`; opens it if necessary."""
        if (source, to) not in self._edges:
            self._open_pair(min(source, to), max(source, to))
        return self._edges[source, to]

    def _open_pair(self, left: int, right: int) -> None:
        """Opens the channels of both directions, in the same order on both members."""
        for source, to in ((left, right), (right, left)):
            self._edges[source, to] = self._open("edge", (source, to))
            if self._rank == source:
                self.send(self._scratch(), to=to).wait()
            else:
                self.receive(self._scratch(), source=source).wait()

    def _scratch(self) -> Tensor:
        return torch.zeros(1, device=self._device)

    def _open(self, kind: str, members: Sequence[int]) -> _Channel:
        """Opens an NCCL communicator of `members` (indices in the group); each of them calls this.

        The store passes NCCL's unique id under a key that contains `kind`: `all` for the complete
        group, `edge` for one direction between two members.
        """
        ranks = [self._members[member] for member in members]
        key = f"nccl/{self._name}/{kind}/{'-'.join(map(str, ranks))}"
        try:
            if members[0] == self._rank:
                numbers = self._library.get_unique_id()
                self._store.set(key, bytes(number & 255 for number in numbers).hex())
            unique_id = bytes.fromhex(self._store.get(key).decode())
            nccl = self._new(len(ranks), unique_id, list(members).index(self._rank))
        except (*self._errors, DistError) as error:
            peers = ", ".join(self._peers[member] for member in members)
            reason = f"{describe(error)}{free_memory(error, self._device)}"
            line = f"{self._name}: no NCCL channel between {peers}: {reason}."
            raise PeerLostError(line) from error
        return _Channel(nccl, create_stream(self._device))

    def _new(self, size: int, unique_id: bytes, rank: int) -> Any:
        try:
            return self._library.NcclCommunicator(size, unique_id, rank)
        except TypeError:  # CuPy before version 14 expects a tuple of signed numbers
            numbers = tuple(number - 256 if number > 127 else number for number in unique_id)
            return self._library.NcclCommunicator(size, numbers, rank)


@dataclass
class _NcclWork:
    """A message in a stream; on a GPU, `wait` delays later computation but not the host.

    The object holds the message's tensors until `wait`: memory that is freed later is used again
    only by computation that is queued later, and so after the message.
    """

    name: str
    event: Event
    check: Callable[[], None]  # raises an error if NCCL reports a failure
    hang_detector: HangDetector
    operation: CurrentOperation
    buffers: Sequence[Tensor]

    def wait(self) -> None:
        with self.operation.during(self.name):
            self.hang_detector.watch(self.name, self._block_compute, check=self.check)
        self.buffers = ()

    def _block_compute(self) -> Event:
        self.event.block_compute()
        return self.event


def load_library() -> Any:
    """Returns the module `cupy.cuda.nccl`; raises ValueError if CuPy or NCCL is not installed."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ValueError(
            f"--dist-backend cupy_nccl: {error}; install CuPy and NCCL for your CUDA version: "
            "`pip install cupy-cuda12x nvidia-nccl-cu12` or `pip install cupy-cuda13x "
            "nvidia-nccl-cu13`, or use --dist-backend nccl (torch's own), or --dist-backend gloo "
            "with --dp-backend gloo"
        ) from None
    if not nccl.available:
        raise ValueError(
            "--dist-backend cupy_nccl: this CuPy has no NCCL; `pip install nvidia-nccl-cu12` (or "
            "nvidia-nccl-cu13 for CUDA 13)"
        )
    return nccl
