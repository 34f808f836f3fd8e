"""Communicators over torch.distributed's NCCL groups, without CuPy. (Not yet run on a GPU.)

As in comm.backends.cupy_nccl, each direction between two neighbours has its own group of two
members, and so its own stream. If both directions shared one stream, an activation would wait for a
gradient. torch creates a group's NCCL communicator at the group's first operation, and blocks the
host until all members have called the operation. If two neighbours both called receive first
and send later, they would wait forever. So the constructor of TorchNcclCommunicator runs one
operation in every group, which creates the group's communicator.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from comm.backends.base import Group, GroupMembership, Post, TorchWork, as_bytes
from comm.backends.hang_detector import HangDetector
from comm.communicator import CurrentOperation, Done, PeerLostError, Work

# torch's timeout is this much longer than --dist-timeout, because torch's error names no peer.
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class TorchGroups:
    """torch's process groups for one set of processes.

    all_members: for collectives, and for messages between members that are not neighbours.
    edges: a group for each direction between neighbours; the key is their indices (source, to).
    """

    all_members: dist.ProcessGroup
    edges: Mapping[tuple[int, int], dist.ProcessGroup]


def make_groups(members: Sequence[int], *, dist_timeout: float) -> TorchGroups:
    """Creates the groups of `members` (global ranks).

    Every process of the world calls this, also a process outside `members`. All processes create
    the same groups in the same order.
    """
    timeout = timedelta(seconds=dist_timeout + _GRACE_SECONDS)
    return TorchGroups(
        all_members=new_group(members, timeout),
        edges={
            (a, b): new_group([members[a], members[b]], timeout)
            for a, b in _directions(len(members))
        },
    )


def new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """Creates an NCCL group; tests without GPUs replace this function and create a gloo group."""
    group: dist.ProcessGroup = dist.new_group(list(ranks), backend="nccl", timeout=timeout)
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
        self._groups = torch_groups
        self._hang_detector = HangDetector(limit=group.dist_timeout, on_hang=on_hang)
        self._open(torch.zeros(1, device=device))

    def send(self, tensor: Tensor, *, to: int) -> Work:
        group = self._groups.edges.get((self._rank, to), self._groups.all_members)
        post = partial(dist.isend, as_bytes(tensor), self._members[to], group=group)
        return self._start(f"send to {self._peers[to]}", tensor, post)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        group = self._groups.edges.get((source, self._rank), self._groups.all_members)
        post = partial(dist.irecv, as_bytes(tensor), self._members[source], group=group)
        return self._start(f"receive from {self._peers[source]}", tensor, post)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Starts summing `tensor` in place on all members; NCCL chooses the order of the sum."""
        post = partial(dist.all_reduce, tensor, group=self._groups.all_members, async_op=True)
        return self._start(f"all-reduce with {self._others}", tensor, post)

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        """Starts summing `tensor` in place on member `root`; NCCL chooses the order of the sum."""
        group, rank = self._groups.all_members, self._members[root]
        post = partial(dist.reduce, tensor, rank, group=group, async_op=True)
        return self._start(f"reduce to {self._peers[root]} with {self._others}", tensor, post)

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        group, rank = self._groups.all_members, self._members[root]
        post = partial(dist.broadcast, as_bytes(tensor), rank, group=group, async_op=True)
        self._start(f"broadcast from {self._peers[root]}", tensor, post).wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        buffers, group = (as_bytes(gathered), as_bytes(tensor)), self._groups.all_members
        post = partial(dist.all_gather_into_tensor, *buffers, group=group, async_op=True)
        self._start(f"all-gather with {self._others}", tensor, post).wait()
        return gathered

    def close(self) -> None:
        self._hang_detector.close()
        for edge, group in self._groups.edges.items():
            if self._rank in edge:
                dist.destroy_process_group(group)
        dist.destroy_process_group(self._groups.all_members)

    def _open(self, scratch: Tensor) -> None:
        """Makes torch create every NCCL communicator, in the same order on all members."""
        self.all_reduce(scratch).wait()
        for source, to in _directions(self.size):
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
            return _TorchNcclWork(operation, post, self._operation, self._hang_detector)


class _TorchNcclWork(TorchWork):
    """An operation in its group's stream; `wait` blocks the current stream and not the host."""

    def __init__(
        self, name: str, post: Post, operation: CurrentOperation, hang_detector: HangDetector
    ) -> None:
        super().__init__(name, post, operation)
        self._hang_detector = hang_detector

    def wait(self) -> None:
        self._hang_detector.add(self._name, self.is_done)  # torch detects failures itself
        super().wait()


def _directions(size: int) -> list[tuple[int, int]]:
    """Returns (source, to) for both directions between neighbours, in a group of `size` members."""
    pairs = [(left, left + 1) for left in range(size - 1)]
    return [edge for left, right in pairs for edge in ((left, right), (right, left))]
