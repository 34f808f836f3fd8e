"""Channels over torch.distributed's gloo groups: tensors in host memory, TCP between hosts.

Messages and broadcasts carry bytes, so that every dtype works. Sums of more than two are added
here, since the order in which gloo adds depends on where in the buffer an element is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from comm.activity import Activity
from comm.communicator import PeerLostError, Work
from comm.topology import Topology

_SLICE_BYTES = 16 * 2**20  # long buffers go in slices: bounded copies, and fewer fresh pages
_SMALL_BYTES = 32 * 2**10  # below this, one round of larger messages beats two
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


class GlooCommunicator:
    """A Communicator over one gloo group.

    name: what the group is, for messages: `pipeline`, `replicas`, `control`.
    members: the global ranks, in the order of the group; this process is one of them.
    dist_timeout: seconds that one operation may wait for a peer.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        name: str,
        members: Sequence[int],
        topology: Topology,
        activity: Activity,
        dist_timeout: float,
    ) -> None:
        self._group = group
        self._name = name
        self._members = tuple(members)
        self._global_rank = topology.rank
        self._rank = self._members.index(topology.rank)
        self._peers = [topology.describe(rank) for rank in self._members]
        self._activity = activity
        self._timeout = timedelta(seconds=dist_timeout)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    def send(self, tensor: Tensor, *, to: int) -> Work:
        return self._message(dist.isend, "send to", tensor, to)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        return self._message(dist.irecv, "receive from", tensor, source)

    def all_reduce(self, tensor: Tensor) -> None:
        """Adds in the order of the members: the bits depend on neither length nor place."""
        if self.size == 2 and tensor.dtype in _GLOO_SUMS:  # a + b == b + a
            post = partial(dist.all_reduce, tensor, group=self._group, async_op=True)
            self._start(f"all-reduce with {self._others}", post).wait()
        elif tensor.nbytes <= _SMALL_BYTES:
            tensor.copy_(_ordered_sum(self._gather(tensor, what="all-reduce")))
        else:
            flat = tensor.view(-1)
            for part in torch.split(flat, _SLICE_BYTES // flat.element_size()):
                self._reduce_and_share(part)

    def reduce(self, tensor: Tensor, *, root: int) -> None:
        """Adds in the order of the members, on `root`, a slice at a time."""
        flat = tensor.view(-1)
        for part in torch.split(flat, max(1, _SLICE_BYTES // flat.element_size())):
            if self._rank == root:
                self._sum_from_others(part)
            else:
                self.send(part, to=root).wait()

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        self._broadcast(tensor, root, what="broadcast").wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._gather(tensor, what="all-gather")

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    @property
    def _others(self) -> str:
        return ", ".join(f"rank {rank}" for rank in self._members if rank != self._global_rank)

    def _reduce_and_share(self, flat: Tensor) -> None:
        """Each member sums its share of a buffer, then gives the sum to all."""
        shares = list(flat.tensor_split(self.size))
        mine = shares[self._rank]
        copies = mine.new_empty((self.size, mine.numel()))
        post = partial(
            dist.all_to_all_single,
            _bytes(copies),
            _bytes(flat),
            [mine.nbytes] * self.size,
            [share.nbytes for share in shares],
            group=self._group,
            async_op=True,
        )
        self._start(f"all-reduce with {self._others}", post).wait()
        mine.copy_(_ordered_sum(copies))
        self._share(shares, what="all-reduce")

    def _sum_from_others(self, part: Tensor) -> None:
        rows = part.new_empty((self.size, part.numel()))
        others = [member for member in range(self.size) if member != self._rank]
        works = [self.receive(rows[member], source=member) for member in others]
        rows[self._rank] = part
        for work in works:
            work.wait()
        part.copy_(_ordered_sum(rows))

    def _gather(self, tensor: Tensor, *, what: str) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        gathered[self._rank] = tensor
        self._share(list(gathered), what=what)
        return gathered

    def _share(self, rows: list[Tensor], *, what: str) -> None:
        """Row m is member m's: every member gets it."""
        works = [self._broadcast(row, member, what=what) for member, row in enumerate(rows)]
        for work in works:
            work.wait()

    def _broadcast(self, tensor: Tensor, root: int, *, what: str) -> Work:
        if tensor.numel() == 0:
            return _Done()
        post = partial(
            dist.broadcast,
            _bytes(tensor),
            self._members[root],
            group=self._group,
            async_op=True,
        )
        if root == self._rank:
            return self._start(f"{what}, send to {self._others}", post)
        return self._start(f"{what}, receive from {self._peers[root]}", post)

    def _message(
        self, post: Callable[..., dist.Work | None], what: str, tensor: Tensor, peer: int
    ) -> Work:
        if tensor.numel() == 0:
            return _Done()
        call = partial(post, _bytes(tensor), self._members[peer], group=self._group)
        return self._start(f"{what} {self._peers[peer]}", call)

    def _start(self, what: str, post: Callable[[], dist.Work | None]) -> Work:
        what = f"{self._name} {what}"
        try:
            work = post()
        except RuntimeError as error:
            raise _lost(what, error, waited=0.0) from error
        assert work is not None  # torch's answer to a process outside the group
        return _Pending(what, work, self._timeout, self._activity)


class _Pending:
    """A gloo operation under way; gloo drops it if this object goes before it is done."""

    def __init__(self, what: str, work: dist.Work, timeout: timedelta, activity: Activity) -> None:
        self._what = what
        self._work = work
        self._timeout = timeout
        self._activity = activity

    def wait(self) -> None:
        started = time.monotonic()
        with self._activity.during(self._what):
            try:
                self._work.wait(self._timeout)
            except RuntimeError as error:
                raise _lost(self._what, error, waited=time.monotonic() - started) from error


class _Done:
    """An empty tensor: nothing travels."""

    def wait(self) -> None:
        """Returns at once."""


def _ordered_sum(rows: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    total = rows[0]
    for row in rows[1:]:
        total += row
    return total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _lost(what: str, error: RuntimeError, *, waited: float) -> PeerLostError:
    reason = str(error).splitlines()[0].rpartition("] ")[2].rstrip(".")
    return PeerLostError(f"{what} failed after {waited:.1f} s (--dist-timeout): {reason}.")
