"""The base of the communicators between processes: their group, and helpers of torch's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comm.communicator import PeerLostError
from comm.topology import Topology


class GroupMembership:
    """This process's place in a group.

    name: of the group, for messages: `pipeline`, `replicas`, `control`.
    members: the global ranks, in the order of the group; this process is one of them.
    """

    def __init__(self, *, name: str, members: Sequence[int], topology: Topology) -> None:
        self._name = name
        self._members = tuple(members)
        self._rank = self._members.index(topology.rank)
        self._peers = [topology.describe(rank) for rank in self._members]

    @property
    def rank(self) -> int:
        """This process's index in the group."""
        return self._rank

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self._members)

    @property
    def _others(self) -> str:
        return ", ".join(peer for member, peer in enumerate(self._peers) if member != self._rank)


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns the same memory as bytes, (nbytes,), which every backend can send."""
    return tensor.detach().view(-1).view(torch.uint8)


def peer_lost(operation: str, error: RuntimeError, *, waited: float) -> PeerLostError:
    """Returns torch's error in one line, with the operation and the seconds that it waited."""
    reason = str(error).splitlines()[0].rpartition("] ")[2].rstrip(".")
    return PeerLostError(f"{operation} failed after {waited:.1f} s (--dist-timeout): {reason}.")
