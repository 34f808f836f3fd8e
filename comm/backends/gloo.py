"""Communicators over torch.distributed's gloo groups; they send tensors in host memory over TCP.

Messages and broadcasts carry bytes, so that every dtype works. A sum over more than two members is
computed in the order of the members (comm.backends.ordered_reduce), because gloo's order depends on
an element's position in the buffer.
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

_SLICE_BYTES = 8 * 2**20  # long buffers are cut into slices, so that the copies stay small
_SMALL_BYTES = 32 * 2**10  # below this size, one round of larger messages is faster than two
_MESSAGE_TAG = 0  # for send and receive; each sum has its own tag
_NUM_SUM_TAGS = 2**30  # gloo's tags are positive ints; fewer sums than this run at once


class GlooCommunicator(GroupMembership):
    """A Communicator over torch's gloo group `torch_group`, which has the members of `group`."""

    def __init__(self, torch_group: dist.ProcessGroup, group: Group) -> None:
        super().__init__(group)
        self._group = torch_group
        self._timeout = timedelta(seconds=group.dist_timeout)
        self._num_sums = 0
        self._sums = InTurn()

    def send(self, tensor: Tensor, *, to: int, tag: int = _MESSAGE_TAG, prefix: str = "") -> Work:
        """Starts a send; the receiver uses the same tag. `prefix` begins the operation's name."""
        post = partial(dist.isend, as_bytes(tensor), self._members[to], group=self._group, tag=tag)
        return self._start(f"{prefix}send to {self._peers[to]}", tensor, post)

    def receive(
        self, tensor: Tensor, *, source: int, tag: int = _MESSAGE_TAG, prefix: str = ""
    ) -> Work:
        """Starts a receive; the sender uses the same tag. `prefix` begins the operation's name."""
        data, rank = as_bytes(tensor), self._members[source]
        post = partial(dist.irecv, data, rank, group=self._group, tag=tag)
        return self._start(f"{prefix}receive from {self._peers[source]}", tensor, post)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Starts a sum over the members; their tensors are added in the order of the members.

        The result's bits do not depend on the buffer's length or on an element's position. With two
        members the order does not matter, so gloo's threads compute the sum. With more members,
        this call starts the first messages; `wait` sends the other messages and adds the tensors.
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
        """Starts a sum that only `root` gets; the tensors are added in the order of the members.

        On `root`, this call starts to receive the first messages, and `wait` receives the other
        messages and adds the tensors. On the other members, this call starts to send all messages.
        """
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
        """Returns an object that sends and receives the messages of the next sum.

        Their tag is the same on all members, because all members start sums in the same order.
        """
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
    """The messages of one sum, which share a tag."""

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
