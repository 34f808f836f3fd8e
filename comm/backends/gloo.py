"""Communicators over torch.distributed's gloo groups: host tensors, TCP between hosts.

Messages and broadcasts carry bytes, so that every dtype works. Sums of more than two members are
added in the order of the members (comm.backends.ordered_reduce), since gloo's order depends on the
position in the buffer.
"""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from comm.backends.base import Group, GroupMembership, Post, TorchWork, as_bytes
from comm.backends.ordered_reduce import GatheredSum, InTurn, SentToRoot, SharedSum, SumAtRoot
from comm.communicator import Done, Work

_SLICE_BYTES = 8 * 2**20  # of long buffers, two at once: bounded copies
_SMALL_BYTES = 32 * 2**10  # below this, one round of larger messages beats two
_MESSAGE_TAG = 0  # of send and receive; each sum has a tag of its own
_NUM_SUM_TAGS = 2**30  # gloo's tags are positive ints; so many sums are never under way


class GlooCommunicator(GroupMembership):
    """A Communicator over `torch_group`, torch's gloo group of the members."""

    def __init__(self, torch_group: dist.ProcessGroup, group: Group) -> None:
        super().__init__(group)
        self._group = torch_group
        self._timeout = timedelta(seconds=group.dist_timeout)
        self._num_sums = 0
        self._sums = InTurn()

    def send(self, tensor: Tensor, *, to: int, tag: int = _MESSAGE_TAG, prefix: str = "") -> Work:
        """Sends to the receive of the same tag; `prefix` begins the name of the operation."""
        post = partial(dist.isend, as_bytes(tensor), self._members[to], group=self._group, tag=tag)
        return self._start(f"{prefix}send to {self._peers[to]}", tensor, post)

    def receive(
        self, tensor: Tensor, *, source: int, tag: int = _MESSAGE_TAG, prefix: str = ""
    ) -> Work:
        """Receives from the send of the same tag; `prefix` begins the name of the operation."""
        data, rank = as_bytes(tensor), self._members[source]
        post = partial(dist.irecv, data, rank, group=self._group, tag=tag)
        return self._start(f"{prefix}receive from {self._peers[source]}", tensor, post)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Adds in the order of the members: the bits depend on neither length nor position.

        gloo's threads do the sum of two members. Of more, the first messages travel from this call
        on; additions and the other messages follow in `wait`.
        """
        if tensor.numel() == 0:
            return Done()
        if self.size == 2 and tensor.dtype != torch.bool:  # a + b == b + a
            post = partial(dist.all_reduce, tensor, group=self._group, async_op=True)
            return self._start(f"all-reduce with {self._others}", tensor, post)
        messages = self._tagged_messages("all-reduce")
        if tensor.nbytes <= _SMALL_BYTES:
            return self._sums.add(GatheredSum(tensor.view(-1), messages))
        return self._sums.add(SharedSum(tensor.view(-1), messages, slice_bytes=_SLICE_BYTES))

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        """Adds in the order of the members, on `root`, in `wait`; the first slice travels now."""
        if tensor.numel() == 0:
            return Done()
        flat, messages = tensor.view(-1), self._tagged_messages("reduce")
        if self._rank == root:
            return self._sums.add(SumAtRoot(flat, messages, slice_bytes=_SLICE_BYTES))
        return self._sums.add(SentToRoot(flat, messages, root=root, slice_bytes=_SLICE_BYTES))

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        self._broadcast(tensor, root, operation="broadcast").wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        gathered[self._rank] = tensor
        works = [self._broadcast(row, m, operation="all-gather") for m, row in enumerate(gathered)]
        for work in works:
            work.wait()
        return gathered

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    def _tagged_messages(self, operation: str) -> "_TaggedMessages":
        """Returns those of the next sum; all members start sums in one order, so tags match."""
        self._num_sums += 1
        return _TaggedMessages(self, f"{operation}, ", 1 + self._num_sums % _NUM_SUM_TAGS)

    def _broadcast(self, tensor: Tensor, root: int, *, operation: str) -> Work:
        data, source = as_bytes(tensor), self._members[root]
        post = partial(dist.broadcast, data, source, group=self._group, async_op=True)
        if root == self._rank:
            return self._start(f"{operation}, send to {self._others}", tensor, post)
        return self._start(f"{operation}, receive from {self._peers[root]}", tensor, post)

    def _start(self, operation: str, tensor: Tensor, post: Post) -> Work:
        if tensor.numel() == 0:
            return Done()
        return TorchWork(f"{self._name} {operation}", post, self._operation, self._timeout)


@dataclass(frozen=True)
class _TaggedMessages:
    """The messages of one sum."""

    _channel: GlooCommunicator
    _prefix: str
    _tag: int

    @property
    def rank(self) -> int:
        return self._channel.rank

    @property
    def size(self) -> int:
        return self._channel.size

    def send(self, tensor: Tensor, *, to: int) -> Work:
        return self._channel.send(tensor, to=to, tag=self._tag, prefix=self._prefix)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        return self._channel.receive(tensor, source=source, tag=self._tag, prefix=self._prefix)
