"""Communicators over torch.distributed's NCCL groups, without CuPy. (Not yet run on a GPU.)

As in comm.backends.cupy_nccl, each direction between two neighbours has its own group of two
members, and so its own stream. If both directions shared one stream, an activation would wait for a
gradient. torch creates a group's NCCL communicator at the group's first operation, and blocks the
host until all members have called the operation. If two neighbours both called receive first
and send later, they would wait forever. So the constructor of TorchNcclCommunicator runs one
operation in every group, which creates the group's communicator.

Only the groups that are used are made: a pipeline sends messages between neighbours, and the
replicas of a stage run collectives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import permutations

import torch
import torch.distributed as dist
from torch import Tensor

from comm.backends.base import Group, GroupMembership, Post, TorchWork, as_bytes
from comm.backends.hang_detector import HangDetector
from comm.backends.nccl_errors import free_memory
from comm.backends.streams import Event, compute_event
from comm.communicator import Done, PeerLostError, Work

# torch's timeout is this much longer than --dist-timeout, because torch's error names no peer.
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class TorchGroups:
    """torch's process groups for one set of processes.

    all_members: for collectives; None for a group that only sends messages. It cannot send
        messages: torch gives both directions between two members one stream, in which a send waits
        for an earlier receive.
    edges: a group for each direction between neighbours; the key is their indices (source, to).
    """

    all_members: dist.ProcessGroup | None
    edges: Mapping[tuple[int, int], dist.ProcessGroup]


def connect_all(members: Sequence[int], *, dist_timeout: float) -> TorchGroups:
    """Creates the group of `members` (global ranks) for collectives.

    Every process of the world calls this, also a process outside `members`. All processes create
    the same groups in the same order. The same applies to `connect_neighbours` and `connect_pairs`.
    """
    return TorchGroups(new_group(members, _timeout(dist_timeout)), {})


def connect_neighbours(members: Sequence[int], *, dist_timeout: float) -> TorchGroups:
    """Creates the groups for messages between neighbours among `members` (global ranks)."""
    timeout = _timeout(dist_timeout)
    edges = {
        (a, b): new_group([members[a], members[b]], timeout) for a, b in _directions(len(members))
    }
    return TorchGroups(None, edges)


def connect_pairs(members: Sequence[int], *, dist_timeout: float) -> TorchGroups:
    """Creates the groups for collectives and for messages between any two members.

    Training does not need them; --check-cluster measures the links with them.
    """
    timeout = _timeout(dist_timeout)
    pairs = permutations(range(len(members)), 2)
    edges = {(a, b): new_group([members[a], members[b]], timeout) for a, b in pairs}
    return TorchGroups(new_group(members, timeout), edges)


def _timeout(dist_timeout: float) -> timedelta:
    return timedelta(seconds=dist_timeout + _GRACE_SECONDS)


def new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """Creates an NCCL group; tests without GPUs replace this function and create a gloo group.

    Its stream has high priority, as in comm.backends.streams.CudaStream.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # otherwise torch warns that the two timeouts differ
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), backend="nccl", timeout=timeout, pg_options=options
    )
    return group


class TorchNcclCommunicator(GroupMembership):
    """A Communicator over torch's NCCL groups.

    `on_hang` gets the error of an operation that failed or took longer than `group.dist_timeout`.
    Raises PeerLostError if a group cannot be connected.
    """

    def __init__(
        self,
        torch_groups: TorchGroups,
        group: Group,
        *,
        device: torch.device,
        on_hang: Callable[[PeerLostError], object],
    ) -> None:
        super().__init__(group)
        self._groups, self._device = torch_groups, device
        self._hang_detector = HangDetector(limit=group.dist_timeout, on_hang=on_hang, device=device)
        try:
            self._open(torch.zeros(1, device=device))
        except PeerLostError as error:
            line = f"{str(error).rstrip('.')}{free_memory(error, device)}."
            raise PeerLostError(line) from error

    def send(self, tensor: Tensor, *, to: int) -> Work:
        group = self._edge(self._rank, to)
        post = partial(dist.isend, as_bytes(tensor), self._members[to], group=group)
        return self._start(f"send to {self._peers[to]}", tensor, post)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        group = self._edge(source, self._rank)
        post = partial(dist.irecv, as_bytes(tensor), self._members[source], group=group)
        return self._start(f"receive from {self._peers[source]}", tensor, post)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Starts summing `tensor` in place on all members; NCCL chooses the order of the sum."""
        post = partial(dist.all_reduce, tensor, group=self._all, async_op=True)
        return self._start(f"all-reduce with {self._others}", tensor, post)

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        """Starts summing `tensor` in place on member `root`; NCCL chooses the order of the sum."""
        group, rank = self._all, self._members[root]
        post = partial(dist.reduce, tensor, rank, group=group, async_op=True)
        return self._start(f"reduce to {self._peers[root]} with {self._others}", tensor, post)

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        group, rank = self._all, self._members[root]
        post = partial(dist.broadcast, as_bytes(tensor), rank, group=group, async_op=True)
        self._start(f"broadcast from {self._peers[root]}", tensor, post).wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        buffers = (as_bytes(gathered), as_bytes(tensor))
        post = partial(dist.all_gather_into_tensor, *buffers, group=self._all, async_op=True)
        self._start(f"all-gather with {self._others}", tensor, post).wait()
        return gathered

    def close(self) -> None:
        self._hang_detector.close()
        for edge, group in self._groups.edges.items():
            if self._rank in edge:
                dist.destroy_process_group(group)
        if self._groups.all_members is not None:
            dist.destroy_process_group(self._groups.all_members)

    def _edge(self, source: int, to: int) -> dist.ProcessGroup:
        edge = self._groups.edges.get((source, to))
        assert edge is not None, f"{self._name}: no group for messages from {source} to {to}"
        return edge

    @property
    def _all(self) -> dist.ProcessGroup:
        assert self._groups.all_members is not None, f"{self._name}: no group of all members"
        return self._groups.all_members

    def _open(self, scratch: Tensor) -> None:
        """Makes torch create every NCCL communicator, in the same order on all members."""
        if self._groups.all_members is not None:
            self.all_reduce(scratch).wait()
        for source, to in self._groups.edges:
            if self._rank == source:
                self.send(scratch, to=to).wait()
            elif self._rank == to:
                self.receive(scratch, source=source).wait()

    def _start(self, operation: str, tensor: Tensor, post: Post) -> Work:
        assert tensor.is_contiguous()
        if tensor.numel() == 0:
            return Done()
        operation = f"{self._name} {operation}"
        with self._operation.during(operation):
            work = TorchWork(operation, post, self._operation)
        return _TorchNcclWork(operation, work, self._hang_detector, self._device)


@dataclass(frozen=True)
class _TorchNcclWork:
    """An operation in its group's stream; `wait` blocks the current stream and not the host."""

    name: str
    work: TorchWork
    hang_detector: HangDetector
    device: torch.device

    def wait(self) -> None:
        self.hang_detector.watch(self.name, self._block_compute)  # torch detects failures itself

    def _block_compute(self) -> Event:
        self.work.wait()
        return compute_event(self.device)


def _directions(size: int) -> list[tuple[int, int]]:
    """Returns (source, to) for both directions between neighbours, in a group of `size` members."""
    pairs = [(left, left + 1) for left in range(size - 1)]
    return [edge for left, right in pairs for edge in ((left, right), (right, left))]
