"""Double of cupy.cuda.nccl.NcclCommunicator: it sends host memory between processes.

The rest of cupy.cuda.nccl is not replaced: unique ids, dtype codes, NcclError. The members of a
communicator connect through abstract Unix sockets, named after the communicator's unique id; each
member waits for all others. Every message has a header; if the header's call, count, dtype or root
is not what the receiver expects, the receiver raises an error.
"""

import ctypes
import hashlib
import queue
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from cupy.cuda import nccl
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from comm.backends.base import Group
from comm.backends.cupy_nccl import NcclCommunicator
from comm.communicator import CurrentOperation, PeerLostError
from comm.topology import Topology

Traffic = Counter[tuple[str, int]]  # bytes sent by this process, by call and dtype code

_DTYPES = {
    nccl.NCCL_INT8: torch.int8,
    nccl.NCCL_UINT8: torch.uint8,
    nccl.NCCL_INT32: torch.int32,
    nccl.NCCL_INT64: torch.int64,
    nccl.NCCL_FLOAT16: torch.float16,
    nccl.NCCL_FLOAT32: torch.float32,
    nccl.NCCL_FLOAT64: torch.float64,
    nccl.NCCL_BFLOAT16: torch.bfloat16,
}
Told = queue.SimpleQueue[PeerLostError]
_MEET_SECONDS = 20.0
_SYSTEM_ERROR, _INVALID_USAGE = 2, 5  # ncclResult_t


class DoubleError(nccl.NcclError):
    """NCCL's error with an additional text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status)
        self._text = text

    def __str__(self) -> str:
        return f"{super().__str__()}: {self._text}"


class Header(NamedTuple):
    """Header of a message: call, root (-1 if the call has none), number of elements, dtype code."""

    call: str
    root: int
    elements: int
    datatype: int

    def pack(self) -> bytes:
        return _HEADER.pack(self.call.encode(), self.root, self.elements, self.datatype)

    @classmethod
    def unpack(cls, data: bytearray) -> "Header":
        call, *numbers = _HEADER.unpack(data)
        return cls(call.rstrip(b"\0").decode(), *numbers)


_HEADER = struct.Struct("<12siqi")


@contextmanager
def nccl_double() -> Iterator[Traffic]:
    """Replaces cupy's communicator; yields how many bytes this process sends, by call and dtype."""
    traffic: Traffic = Counter()
    with patch.object(nccl, "NcclCommunicator", partial(NcclDouble, traffic=traffic)):
        yield traffic


def open_channel(
    store: Store,
    *,
    rank: int,
    size: int,
    name: str = "pipeline",
    dist_timeout: float = 30.0,
    connect_neighbours: bool = True,
    connect_all: bool = True,
) -> tuple[NcclCommunicator, Told]:
    """Returns a CPU communicator, and the queue that gets an error if a call hangs."""
    told: Told = queue.SimpleQueue()
    topology = Topology(rank=rank, num_stages=size, num_replicas=1)
    channel = NcclCommunicator(
        Group(name, tuple(range(size)), topology, CurrentOperation(), dist_timeout),
        device=torch.device("cpu"),
        store=store,
        on_hang=told.put,
    )
    if connect_neighbours:
        channel.connect_neighbours()
    if connect_all:
        channel.connect_all()
    return channel, told


class NcclDouble:
    """Double of cupy.cuda.nccl.NcclCommunicator(ndev, commId, rank) with blocking calls."""

    def __init__(self, ndev: int, commId: bytes, rank: int, *, traffic: Traffic) -> None:
        assert len(commId) == 128
        self._size, self._rank, self._traffic = ndev, rank, traffic
        self._failed = False
        try:
            self._links = _meet(hashlib.sha256(commId).hexdigest(), ndev, rank)
        except OSError as error:
            raise DoubleError(_SYSTEM_ERROR, f"not all members connected: {error}") from error

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        header = self._header("send", -1, count, datatype, stream)
        self._give(peer, header, _memory(sendbuf, count, datatype))

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        assert stream == 0
        self._take(peer, Header("send", -1, count, datatype), _memory(recvbuf, count, datatype))

    def broadcast(
        self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int
    ) -> None:
        header = self._header("broadcast", root, count, datatype, stream)
        _memory(recvbuff, count, datatype).copy_(_memory(sendbuff, count, datatype))
        self._spread(header, _memory(recvbuff, count, datatype), root)

    def allReduce(
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int
    ) -> None:
        assert op == nccl.NCCL_SUM
        header = self._header("allReduce", -1, count, datatype, stream)
        self._sum(header, _memory(sendbuf, count, datatype), recvbuf, root=0)
        self._spread(header, _memory(recvbuf, count, datatype), 0)

    def reduce(
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int
    ) -> None:
        assert op == nccl.NCCL_SUM
        header = self._header("reduce", root, count, datatype, stream)
        self._sum(header, _memory(sendbuf, count, datatype), recvbuf, root=root)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        header = self._header("allGather", -1, count, datatype, stream)
        rows = _memory(recvbuf, self._size * count, datatype).view(self._size, count)
        rows[self._rank] = _memory(sendbuf, count, datatype)
        for root, row in enumerate(rows):
            self._spread(header, row, root)

    def check_async_error(self) -> None:
        if self._failed:
            raise DoubleError(_SYSTEM_ERROR, "the communicator has failed")

    def destroy(self) -> None:
        for link in self._links.values():
            link.close()

    def _header(self, call: str, root: int, count: int, datatype: int, stream: int) -> Header:
        assert stream == 0
        self._traffic[call, datatype] += count * _DTYPES[datatype].itemsize
        return Header(call, root, count, datatype)

    def _others(self) -> list[int]:
        return [member for member in range(self._size) if member != self._rank]

    def _sum(self, header: Header, mine: Tensor, target: int, *, root: int) -> None:
        """Adds the tensors of all members on `root`, in the order of the members."""
        if self._rank != root:
            self._give(root, header, mine)
            return
        rows = mine.new_empty((self._size, header.elements))
        rows[self._rank] = mine
        for member in self._others():
            self._take(member, header, rows[member])
        total = rows[0]
        for row in rows[1:]:
            total += row
        _memory(target, header.elements, header.datatype).copy_(total)

    def _spread(self, header: Header, data: Tensor, root: int) -> None:
        if self._rank != root:
            self._take(root, header, data)
            return
        for member in self._others():
            self._give(member, header, data)

    def _give(self, peer: int, header: Header, data: Tensor) -> None:
        with self._failing():
            self._links[peer].sendall(header.pack() + _raw(data))

    def _take(self, peer: int, expected: Header, target: Tensor) -> None:
        with self._failing():
            found = Header.unpack(_read(self._links[peer], _HEADER.size))
            if found != expected:
                raise DoubleError(_INVALID_USAGE, f"expected {expected}, received {found}")
            _raw(target)[:] = _read(self._links[peer], target.nbytes)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Closes the connections after an error, so that later calls fail here and at the peers."""
        try:
            yield
        except (OSError, nccl.NcclError) as error:
            self._failed = True
            self.destroy()
            if isinstance(error, OSError):
                raise DoubleError(_SYSTEM_ERROR, str(error)) from error
            raise


def _meet(name: str, size: int, rank: int) -> dict[int, socket.socket]:
    """Connects to every other member; the member with the higher rank opens the connection."""
    links: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(_address(name, rank))
        door.listen(size)
        door.settimeout(_MEET_SECONDS)
        for member in range(rank):
            links[member] = _call(_address(name, member))
            links[member].sendall(struct.pack("<i", rank))
        while len(links) < size - 1:
            link, _ = door.accept()
            links[struct.unpack("<i", _read(link, 4))[0]] = link
    return links


def _call(address: str) -> socket.socket:
    deadline = time.monotonic() + _MEET_SECONDS
    while True:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(address)
            return link
        except ConnectionRefusedError:
            link.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _address(name: str, member: int) -> str:
    return f"\0nccl-double-{name}-{member}"


def _memory(pointer: int, count: int, datatype: int) -> Tensor:
    """Returns the memory at `pointer` as a tensor."""
    dtype = _DTYPES[datatype]
    data = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(data, dtype=dtype)


def _raw(data: Tensor) -> memoryview:
    return memoryview(data.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read(link: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = link.recv_into(view)
        if got == 0:
            raise ConnectionResetError("the peer closed the connection")
        view = view[got:]
    return data
