"""Parts that communicators share: a group, the membership in it, and torch's async operations."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from comm.backends.nccl_errors import describe
from comm.communicator import CurrentOperation, PeerLostError
from comm.topology import Topology

Post: TypeAlias = Callable[[], dist.Work | None]  # starts a torch operation
_NO_TIMEOUT = timedelta(0)  # torch's kNoTimeout: the timeout of torch's group applies


@dataclass(frozen=True)
class Group:
    """A group of processes, and the settings that apply while this process waits for a peer.

    name: `pipeline`, `replicas` or `control`; errors quote the name.
    members: the global ranks, in the order of the group; this process is one of them.
    operation: holds the name of the operation that this process waits for.
    dist_timeout: seconds that one operation may wait for a peer.
    """

    name: str
    members: tuple[int, ...]
    topology: Topology
    operation: CurrentOperation
    dist_timeout: float


class GroupMembership:
    """The index of this process in a group, and the names of the group's members."""

    def __init__(self, group: Group) -> None:
        self._name, self._members = group.name, group.members
        self._rank = group.members.index(group.topology.rank)
        self._peers = [group.topology.describe(rank) for rank in group.members]
        self._operation = group.operation

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    @property
    def _others(self) -> str:
        return ", ".join(peer for member, peer in enumerate(self._peers) if member != self._rank)


class TorchWork:
    """A torch operation; the constructor starts the operation, and `timeout` limits the wait.

    gloo cancels the operation if this object is deleted before the operation is done.
    """

    def __init__(
        self, name: str, post: Post, operation: CurrentOperation, timeout: timedelta = _NO_TIMEOUT
    ) -> None:
        self._name, self._operation, self._timeout = name, operation, timeout
        try:
            work = post()
        except RuntimeError as error:
            raise _peer_lost(name, error, waited=0.0) from error
        assert work is not None  # torch returns None only outside the group
        self._work: dist.Work | None = work

    def wait(self) -> None:
        started, work = time.monotonic(), self._work
        assert work is not None, "wait is called once"
        with self._operation.during(self._name):
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                raise _peer_lost(self._name, error, waited=time.monotonic() - started) from error
        self._work = None  # torch's object holds the tensors


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns a view of the tensor as bytes (nbytes,), because every backend can send bytes."""
    return tensor.detach().view(-1).view(torch.uint8)


def _peer_lost(operation: str, error: RuntimeError, *, waited: float) -> PeerLostError:
    """Returns a one-line error with the operation, the seconds waited and torch's reason."""
    return PeerLostError(
        f"{operation} failed after {waited:.1f} s (--dist-timeout): {describe(error)}."
    )
