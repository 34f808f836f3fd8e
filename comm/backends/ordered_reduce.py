"""Sums over the members of a group, added in the order of the members.

Libraries add in an order that depends on where in the buffer an element is, and on how long the
buffer is. These add on the host, out of messages between pairs that meet no other sum's. All are
Works: the first messages travel from the making of the object, while the caller computes; `wait`
does the rest. Long buffers go in slices, of which two are under way: what a sum needs beside its
buffer is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from comm.communicator import PointToPoint, Work


class InTurn:
    """The sums of a group that are under way: they end in the order in which they were started.

    Whichever is waited for first, the ones before it are ended first. Else a member could wait for
    the second round of one sum while another waits for that of the next, for ever.
    """

    def __init__(self) -> None:
        self._under_way: deque[Work] = deque()

    def add(self, work: Work) -> Work:
        """The same sum, to be waited for in its turn."""
        self._under_way.append(work)
        return _Turn(work, self._under_way)


class _Turn:
    def __init__(self, work: Work, under_way: deque[Work]) -> None:
        self._work = work
        self._under_way = under_way

    def wait(self) -> None:
        while self._work in self._under_way:
            self._under_way.popleft().wait()


class GatheredSum:
    """Every member gets all tensors and adds them: one round of messages, for what is short."""

    def __init__(self, flat: Tensor, messages: PointToPoint) -> None:
        self._flat = flat
        self._rows = flat.new_empty((messages.size, flat.numel()))
        mine = self._rows[messages.rank]
        mine.copy_(flat)
        self._works = _receive_rows(self._rows, messages)
        self._works += [messages.send(mine, to=member) for member in _others(messages)]

    def wait(self) -> None:
        _wait(self._works)
        self._flat.copy_(_sum_rows(self._rows))


class SharedSum:
    """Each member sums its share of every slice, then gives the sum to all: two rounds."""

    def __init__(self, flat: Tensor, messages: PointToPoint, *, slice_bytes: int) -> None:
        parts = _slices(flat, slice_bytes)
        self._slices = (_SharedSlice(part, messages) for part in parts)
        self._begun = next(self._slices, None)

    def wait(self) -> None:
        given: list[Work] = []
        while self._begun is not None:
            current, self._begun = self._begun, next(self._slices, None)
            given += current.sum_and_give()
        _wait(given)


class _SharedSlice:
    def __init__(self, flat: Tensor, messages: PointToPoint) -> None:
        self._messages = messages
        self._shares = flat.tensor_split(messages.size)
        self._mine = self._shares[messages.rank]
        self._rows = self._mine.new_empty((messages.size, self._mine.numel()))
        self._rows[messages.rank] = self._mine
        self._works = _receive_rows(self._rows, messages)
        for member in _others(messages):
            self._works.append(messages.send(self._shares[member], to=member))

    def sum_and_give(self) -> list[Work]:
        """Waits for the others' parts of this member's share; the sums are then under way."""
        _wait(self._works)
        self._mine.copy_(_sum_rows(self._rows))
        works = []
        for member in _others(self._messages):
            works.append(self._messages.receive(self._shares[member], source=member))
            works.append(self._messages.send(self._mine, to=member))
        return works


class SumAtRoot:
    """The sum on the one member that gets it; the others have a SentToRoot."""

    def __init__(self, flat: Tensor, messages: PointToPoint, *, slice_bytes: int) -> None:
        self._slices = (_RootSlice(part, messages) for part in _slices(flat, slice_bytes))
        self._begun = next(self._slices, None)

    def wait(self) -> None:
        while self._begun is not None:
            current, self._begun = self._begun, next(self._slices, None)
            current.sum()


class _RootSlice:
    def __init__(self, flat: Tensor, messages: PointToPoint) -> None:
        self._flat = flat
        self._rows = flat.new_empty((messages.size, flat.numel()))
        self._rows[messages.rank] = flat
        self._works = _receive_rows(self._rows, messages)

    def sum(self) -> None:
        _wait(self._works)
        self._flat.copy_(_sum_rows(self._rows))


class SentToRoot:
    """The other members' side of a SumAtRoot; all slices are sent at once, out of the buffer."""

    def __init__(
        self, flat: Tensor, messages: PointToPoint, *, root: int, slice_bytes: int
    ) -> None:
        self._works = [messages.send(part, to=root) for part in _slices(flat, slice_bytes)]

    def wait(self) -> None:
        _wait(self._works)


def _slices(flat: Tensor, slice_bytes: int) -> Iterator[Tensor]:
    return iter(torch.split(flat, max(1, slice_bytes // flat.element_size())))


def _receive_rows(rows: Tensor, messages: PointToPoint) -> list[Work]:
    """Row m is member m's."""
    return [messages.receive(rows[member], source=member) for member in _others(messages)]


def _others(messages: PointToPoint) -> Iterator[int]:
    return (member for member in range(messages.size) if member != messages.rank)


def _sum_rows(rows: Tensor) -> Tensor:
    """The sum over the first dimension, in its order; the rows are used up."""
    total = rows[0]
    for row in rows[1:]:
        total += row
    return total


def _wait(works: Iterable[Work]) -> None:
    for work in works:
        work.wait()
