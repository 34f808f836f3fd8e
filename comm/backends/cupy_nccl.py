"""Communicators over NCCL, by CuPy: tensors go from GPU to GPU. (Not yet run on a GPU.)

For host tensors everything but NCCL's own communicator runs as on a GPU, with threads instead of
CUDA streams: tests replace that class alone.

A pipeline stage's activation and its neighbour's gradient travel at the same time. On one NCCL
communicator each would wait until the other is done, so every direction between two neighbours has
a communicator of two members and a stream of its own. NCCL connects two members at their first
message, which blocks the host until the other member has called, too: a receive posted ahead would
wait forever for a sender that waits likewise. So every communicator carries one message when it is
opened, in one order for all members. Other pairs are opened at their first message.
"""

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
from comm.backends.streams import Event, Stream, create_stream
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
    """An NCCL communicator (`cupy.cuda.nccl.NcclCommunicator`) and its stream."""

    nccl: Any
    stream: Stream


class NcclCommunicator(GroupMembership):
    """A Communicator over NCCL.

    name, members: as of GroupMembership.
    store: the first member of a channel posts NCCL's unique id there for the others.
    operation: names the operation that this process waits for.
    dist_timeout, on_hang: a wait of more than these seconds is reported to `on_hang`.

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
        operation: CurrentOperation,
        dist_timeout: float,
        on_hang: Callable[[PeerLostError], object],
    ) -> None:
        self._library = load_library()
        super().__init__(name=name, members=members, topology=topology)
        self._device = device
        self._store = store
        self._operation = operation
        self._hang_detector = HangDetector(limit=dist_timeout, on_hang=on_hang)
        self._edges: dict[tuple[int, int], _Channel] = {}
        self._all = self._open("all", range(self.size))
        if self.size > 1:
            self.all_reduce(self._scratch()).wait()

    def connect_neighbours(self) -> None:
        """Opens the channels between neighbours; every member calls it before their messages."""
        for left in range(self.size - 1):  # in one order: no circle of members that wait
            if self._rank in (left, left + 1):
                self._open_pair(left, left + 1)

    def send(self, tensor: Tensor, *, to: int) -> Work:
        channel = self._edge(self._rank, to)
        return self._run(
            f"send to {self._peers[to]}",
            channel,
            tensor,
            lambda *message: channel.nccl.send(*message, 1, channel.stream.pointer),
        )

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        channel = self._edge(source, self._rank)
        return self._run(
            f"receive from {self._peers[source]}",
            channel,
            tensor,
            lambda *message: channel.nccl.recv(*message, 0, channel.stream.pointer),
        )

    def all_reduce(self, tensor: Tensor) -> Work:
        """NCCL chooses the order of the sum."""
        assert tensor.dtype != torch.bool
        nccl, stream = self._all.nccl, self._all.stream.pointer
        return self._run(
            f"all-reduce with {self._others}",
            self._all,
            tensor,
            lambda data, *kind: nccl.allReduce(data, data, *kind, _SUM, stream),
        )

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        """NCCL chooses the order of the sum."""
        assert tensor.dtype != torch.bool
        nccl, stream = self._all.nccl, self._all.stream.pointer
        return self._run(
            f"reduce to {self._peers[root]} with {self._others}",
            self._all,
            tensor,
            lambda data, *kind: nccl.reduce(data, data, *kind, _SUM, root, stream),
        )

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        nccl, stream = self._all.nccl, self._all.stream.pointer
        self._run(
            f"broadcast from {self._peers[root]}",
            self._all,
            tensor,
            lambda data, *kind: nccl.broadcast(data, data, *kind, root, stream),
        ).wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        self._all.stream.wait_for_compute(gathered)
        nccl, stream = self._all.nccl, self._all.stream.pointer
        self._run(
            f"all-gather with {self._others}",
            self._all,
            tensor,
            lambda data, *kind: nccl.allGather(data, gathered.data_ptr(), *kind, stream),
        ).wait()
        return gathered

    def close(self) -> None:
        channels = (*self._edges.values(), self._all)
        for channel in channels:  # the hang detector still runs
            channel.stream.close()
        self._hang_detector.close()
        for channel in channels:
            channel.nccl.destroy()

    def _run(self, what: str, channel: _Channel, tensor: Tensor, call: Callable[..., None]) -> Work:
        """Submits `call(pointer, count, dtype code)` to the channel's stream."""
        assert tensor.is_contiguous()
        if tensor.numel() == 0:
            return Done()
        operation = f"{self._name} {what}"

        def guarded() -> None:
            try:
                call(tensor.data_ptr(), tensor.numel(), DTYPE_CODES[tensor.dtype])
            except self._library.NcclError as error:
                raise PeerLostError(f"{operation} failed: {error}.") from error

        channel.stream.wait_for_compute(tensor)
        with self._operation.during(operation):
            channel.stream.submit(guarded)
        event = channel.stream.record_event()
        check = channel.nccl.check_async_error
        start_limit = partial(self._hang_detector.add, operation, event, check)
        return _NcclWork(operation, event, start_limit, self._operation)

    def _edge(self, source: int, to: int) -> _Channel:
        """Returns the channel of messages from one member to another."""
        if (source, to) not in self._edges:
            self._open_pair(min(source, to), max(source, to))
        return self._edges[source, to]

    def _open_pair(self, left: int, right: int) -> None:
        """Opens both directions between two members, in one order at both."""
        for source, to in ((left, right), (right, left)):
            self._edges[source, to] = self._open("edge", (source, to))
            if self._rank == source:
                self.send(self._scratch(), to=to).wait()
            else:
                self.receive(self._scratch(), source=source).wait()

    def _scratch(self) -> Tensor:
        return torch.zeros(1, device=self._device)

    def _open(self, kind: str, members: Sequence[int]) -> _Channel:
        """Opens a communicator of `members` (indices in the group), who all call this.

        `kind` tells the group of all from an edge between the same two members.
        """
        ranks = [self._members[member] for member in members]
        key = f"nccl/{self._name}/{kind}/{'-'.join(map(str, ranks))}"
        try:
            if members[0] == self._rank:
                numbers = self._library.get_unique_id()
                self._store.set(key, bytes(number & 255 for number in numbers).hex())
            unique_id = bytes.fromhex(self._store.get(key).decode())
            nccl = self._new(len(ranks), unique_id, list(members).index(self._rank))
        except (self._library.NcclError, DistError) as error:
            peers = ", ".join(self._peers[member] for member in members)
            raise PeerLostError(
                f"{self._name}: no NCCL channel between {peers}: {error}."
            ) from error
        return _Channel(nccl, create_stream(self._device))

    def _new(self, size: int, unique_id: bytes, rank: int) -> Any:
        try:
            return self._library.NcclCommunicator(size, unique_id, rank)
        except TypeError:  # CuPy before 14 wants a tuple of signed numbers
            numbers = tuple(number - 256 if number > 127 else number for number in unique_id)
            return self._library.NcclCommunicator(size, numbers, rank)


class _NcclWork:
    """A message in its stream: on a GPU, `wait` blocks the computation, not the host."""

    def __init__(
        self, name: str, event: Event, start_limit: Callable[[], None], operation: CurrentOperation
    ) -> None:
        self._name = name
        self._event = event
        self._start_limit = start_limit
        self._operation = operation

    def wait(self) -> None:
        self._start_limit()
        with self._operation.during(self._name):
            self._event.block_compute()


def load_library() -> Any:
    """Returns the module `cupy.cuda.nccl`.

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
