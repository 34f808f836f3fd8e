"""Channels over torch.distributed's gloo groups: tensors in host memory, TCP between hosts.

Everything but broadcast is built of point-to-point messages of bytes, so that every dtype works
and no result depends on how gloo cuts a buffer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from comm.activity import Activity
from comm.communicator import PeerLostError, Work
from comm.topology import Topology

_MESSAGES, _COLLECTIVES = 0, 1  # gloo matches messages by tag: the two kinds never meet
_SLICE_BYTES = 64 * 2**20


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
        return self._send(tensor, to, what="send to", tag=_MESSAGES)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        return self._receive(tensor, source, what="receive from", tag=_MESSAGES)

    def all_reduce(self, tensor: Tensor) -> None:
        """Each member sums its share of the elements in the order of the members, then shares it.

        So the bits depend on neither the buffer's length nor an element's place in it. Long
        buffers go in slices, so that the copies of the others' elements stay within bounds.
        """
        flat = tensor.view(-1)
        for part in torch.split(flat, _SLICE_BYTES // flat.element_size()):
            shares = list(part.tensor_split(self.size))
            mine = shares[self._rank]
            copies = [torch.empty_like(mine) for _ in self._members]
            copies[self._rank] = mine.clone()
            self._exchange("all-reduce", sources=shares, targets=copies)
            total = copies[0]
            for copy in copies[1:]:
                total += copy
            mine.copy_(total)
            self._exchange("all-reduce", sources=[mine] * self.size, targets=shares)

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        if tensor.numel() == 0:
            return
        what = f"broadcast from {self._peers[root]}"
        source = self._members[root]
        self._start(
            what,
            lambda: dist.broadcast(_bytes(tensor), source, group=self._group, async_op=True),
        ).wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        gathered[self._rank] = tensor
        rows = list(gathered)
        self._exchange("all-gather", sources=[rows[self._rank]] * self.size, targets=rows)
        return gathered

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    def _exchange(self, name: str, *, sources: list[Tensor], targets: list[Tensor]) -> None:
        """Sends `sources[m]` to, and receives `targets[m]` from, every other member m."""
        others = [member for member in range(self.size) if member != self._rank]
        works = [
            self._receive(targets[m], m, what=f"{name}, receive from", tag=_COLLECTIVES)
            for m in others
        ]
        works += [
            self._send(sources[m], m, what=f"{name}, send to", tag=_COLLECTIVES) for m in others
        ]
        for work in works:
            work.wait()

    def _send(self, tensor: Tensor, to: int, *, what: str, tag: int) -> Work:
        if tensor.numel() == 0:
            return _Done()
        rank = self._members[to]
        return self._start(
            f"{what} {self._peers[to]}",
            lambda: dist.isend(_bytes(tensor), rank, group=self._group, tag=tag),
        )

    def _receive(self, tensor: Tensor, source: int, *, what: str, tag: int) -> Work:
        if tensor.numel() == 0:
            return _Done()
        rank = self._members[source]
        return self._start(
            f"{what} {self._peers[source]}",
            lambda: dist.irecv(_bytes(tensor), rank, group=self._group, tag=tag),
        )

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


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _lost(what: str, error: RuntimeError, *, waited: float) -> PeerLostError:
    reason = str(error).splitlines()[0].rpartition("] ")[2].rstrip(".")
    return PeerLostError(f"{what} failed after {waited:.1f} s (--dist-timeout): {reason}.")
