"""Communicators over torch.distributed's gloo groups: host tensors, TCP between hosts.

Messages and broadcasts carry bytes, so that every dtype works. Sums of more than two members are
added in the order of the members (comm.backends.ordered_reduce), since gloo's order depends on the
position in the buffer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from comm.backends.base import GroupMembership, as_bytes, peer_lost
from comm.backends.ordered_reduce import GatheredSum, InTurn, SentToRoot, SharedSum, SumAtRoot
from comm.communicator import CurrentOperation, Done, Work
from comm.topology import Topology

_SLICE_BYTES = 8 * 2**20  # of long buffers, two at once: bounded copies
_SMALL_BYTES = 32 * 2**10  # below this, one round of larger messages beats two
_MESSAGE_TAG = 0  # of send and receive; each sum has a tag of its own
_NUM_SUM_TAGS = 2**30  # gloo's tags are positive ints; so many sums are never under way
_GLOO_SUMS = frozenset(
    (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
    )
)


class GlooCommunicator(GroupMembership):
    """A Communicator over one gloo group.

    name, members: as of GroupMembership.
    operation: names the operation that this process waits for.
    dist_timeout: seconds that one operation may wait for a peer.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        name: str,
        members: Sequence[int],
        topology: Topology,
        operation: CurrentOperation,
        dist_timeout: float,
    ) -> None:
        self._group = group
        super().__init__(name=name, members=members, topology=topology)
        self._operation = operation
        self._timeout = timedelta(seconds=dist_timeout)
        self._num_sums = 0
        self._sums = InTurn()

    def send(self, tensor: Tensor, *, to: int) -> Work:
        return self.send_tagged(tensor, to, prefix="", tag=_MESSAGE_TAG)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        return self.receive_tagged(tensor, source, prefix="", tag=_MESSAGE_TAG)

    def send_tagged(self, tensor: Tensor, to: int, *, prefix: str, tag: int) -> Work:
        """As `send`, to the receive of the same tag. `prefix` begins the operation's name."""
        return self._message(dist.isend, f"{prefix}send to", tensor, to, tag)

    def receive_tagged(self, tensor: Tensor, source: int, *, prefix: str, tag: int) -> Work:
        """As `receive`, for `send_tagged`."""
        return self._message(dist.irecv, f"{prefix}receive from", tensor, source, tag)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Adds in the order of the members: the bits depend on neither length nor position.

        gloo's threads do the sum of two members. Of more, the first messages travel from this call
        on; additions and the other messages follow in `wait`.
        """
        if tensor.numel() == 0:
            return Done()
        if self.size == 2 and tensor.dtype in _GLOO_SUMS:  # a + b == b + a
            post = partial(dist.all_reduce, tensor, group=self._group, async_op=True)
            return self._start(f"all-reduce with {self._others}", post)
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
        rows = enumerate(gathered)
        works = [self._broadcast(row, m, operation="all-gather") for m, row in rows]
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
        if tensor.numel() == 0:
            return Done()
        post = partial(
            dist.broadcast,
            as_bytes(tensor),
            self._members[root],
            group=self._group,
            async_op=True,
        )
        if root == self._rank:
            return self._start(f"{operation}, send to {self._others}", post)
        return self._start(f"{operation}, receive from {self._peers[root]}", post)

    def _message(
        self,
        post: Callable[..., dist.Work | None],
        operation: str,
        tensor: Tensor,
        peer: int,
        tag: int,
    ) -> Work:
        if tensor.numel() == 0:
            return Done()
        call = partial(post, as_bytes(tensor), self._members[peer], group=self._group, tag=tag)
        return self._start(f"{operation} {self._peers[peer]}", call)

    def _start(self, operation: str, post: Callable[[], dist.Work | None]) -> Work:
        operation = f"{self._name} {operation}"
        try:
            work = post()
        except RuntimeError as error:
            raise peer_lost(operation, error, waited=0.0) from error
        assert work is not None  # torch's answer to a process outside the group
        return _GlooWork(operation, work, self._timeout, self._operation)


class _GlooWork:
    """A gloo operation under way; gloo drops it if this object is deleted before it is done."""

    def __init__(
        self, name: str, work: dist.Work, timeout: timedelta, operation: CurrentOperation
    ) -> None:
        self._name = name
        self._work = work
        self._timeout = timeout
        self._operation = operation

    def wait(self) -> None:
        started = time.monotonic()
        with self._operation.during(self._name):
            try:
                self._work.wait(self._timeout)
            except RuntimeError as error:
                raise peer_lost(self._name, error, waited=time.monotonic() - started) from error


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
        return self._channel.send_tagged(tensor, to, prefix=self._prefix, tag=self._tag)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        return self._channel.receive_tagged(tensor, source, prefix=self._prefix, tag=self._tag)
