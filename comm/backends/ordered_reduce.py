"""Sums of tensors over the members of a group; the tensors are added in the members' order.

Libraries add in an order that depends on an element's position in the buffer and on the buffer's
length. Here the host adds the tensors, which arrive as point-to-point messages. The messages of a
sum carry a tag that no other sum uses, so that no other sum receives them. Every sum is a Work: the
constructor starts the first messages, and `wait` does the rest. Long buffers are cut into slices,
and at most two slices are in transfer, so that the received copies take little memory.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comm.communicator import PointToPoint, Work


class InTurn:
    """The unfinished sums of a group; they complete in the order in which they were started.

    A wait for one sum completes all earlier sums first. Otherwise two members that wait for
    different sums could wait forever, because a SharedSum sends a member's result only in `wait`.
    One thread may start sums while another thread waits (comm.backends.host_staging).
    """

    def __init__(self) -> None:
        self._under_way: deque[Work] = deque()
        self._changing = threading.Lock()  # held only while the deque is read or changed
        self._completing = threading.Lock()  # held during a wait, so that sums complete in order

    def add(self, work: Work) -> Work:
        """Adds `work`; returns a Work whose `wait` completes all earlier sums, then this sum."""
        with self._changing:
            self._under_way.append(work)
        return _Turn(work, self)

    def complete(self, work: Work) -> None:
        """Waits for all sums up to `work`; does nothing if `work` is complete."""
        with self._completing:
            while (earliest := self._take_until(work)) is not None:
                earliest.wait()

    def _take_until(self, work: Work) -> Work | None:
        """Removes and returns the earliest sum; returns None if `work` is not under way."""
        with self._changing:
            return self._under_way.popleft() if work in self._under_way else None


@dataclass(frozen=True)
class _Turn:
    work: Work
    sums: InTurn

    def wait(self) -> None:
        self.sums.complete(self.work)


class GatheredSum:
    """An all-reduce in one round, for short buffers: every member receives and adds all tensors."""

    def __init__(self, flat: Tensor, messages: PointToPoint) -> None:
        self._part = _Part(flat, messages, sent=[flat] * messages.size)

    def wait(self) -> None:
        self._part.sum()


class SharedSum:
    """An all-reduce in two rounds: each member sums a share of a slice and sends the sum to all."""

    def __init__(self, flat: Tensor, messages: PointToPoint, *, slice_bytes: int) -> None:
        self._shares = (s.tensor_split(messages.size) for s in _slices(flat, slice_bytes))
        self._messages = messages
        self._next = self._start()

    def wait(self) -> None:
        works: list[Work] = []
        while self._next is not None:
            (shares, part), self._next = self._next, self._start()
            part.sum()
            for member in _others(self._messages):
                works.append(self._messages.receive(shares[member], source=member))
                works.append(self._messages.send(shares[self._messages.rank], to=member))
        _wait(works)

    def _start(self) -> "tuple[Sequence[Tensor], _Part] | None":
        """Starts the first round of the next slice; returns None after the last slice.

        Returns the slice as one share for each member, and the _Part that sums this member's share.
        """
        shares = next(self._shares, None)
        if shares is None:
            return None
        return shares, _Part(shares[self._messages.rank], self._messages, sent=shares)


class SumAtRoot:
    """The root member's side of a reduce; every non-root member has a SentToRoot."""

    def __init__(self, flat: Tensor, messages: PointToPoint, *, slice_bytes: int) -> None:
        self._parts = (_Part(part, messages) for part in _slices(flat, slice_bytes))
        self._next = next(self._parts, None)

    def wait(self) -> None:
        while self._next is not None:
            part, self._next = self._next, next(self._parts, None)
            part.sum()


class SentToRoot:
    """A non-root member's side of a reduce; the constructor starts all sends, without a copy."""

    def __init__(
        self, flat: Tensor, messages: PointToPoint, *, root: int, slice_bytes: int
    ) -> None:
        self._works = [messages.send(part, to=root) for part in _slices(flat, slice_bytes)]

    def wait(self) -> None:
        _wait(self._works)


class _Part:
    """The sum of `own` and a tensor from each other member; `sent[m]` is sent to member m."""

    def __init__(self, own: Tensor, messages: PointToPoint, *, sent: Sequence[Tensor] = ()) -> None:
        self._own = own
        self._rows = own.new_empty((messages.size, own.numel()))
        self._rows[messages.rank] = own
        others = _others(messages)
        self._works = [messages.receive(self._rows[member], source=member) for member in others]
        if sent:
            self._works += [messages.send(sent[member], to=member) for member in others]

    def sum(self) -> None:
        """Waits for the other members' elements; sets `own` to the sum in the members' order."""
        _wait(self._works)
        total = self._rows[0]
        for row in self._rows[1:]:
            total += row
        self._own.copy_(total)


def _slices(flat: Tensor, slice_bytes: int) -> Iterator[Tensor]:
    return iter(torch.split(flat, max(1, slice_bytes // flat.element_size())))


def _others(messages: PointToPoint) -> list[int]:
    return [member for member in range(messages.size) if member != messages.rank]


def _wait(works: Iterable[Work]) -> None:
    for work in works:
        work.wait()
