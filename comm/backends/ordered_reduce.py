"""Sums over the members of a group, added in the order of the members.

Libraries add in an order that depends on an element's position in the buffer and on the buffer's
length. These sums are added on the host, from point-to-point messages with tags of their own. All
are Works: the constructor starts the first messages, while the caller computes; `wait` does the
rest. Long buffers are cut into slices, two of which are under way, so that copies stay small.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from comm.communicator import PointToPoint, Work


class InTurn:
    """The sums of a group that are under way: they complete in the order of their start.

    To wait for a sum completes the earlier ones first. Otherwise one member could wait for the
    second round of one sum while another waits for that of the next, forever.
    """

    def __init__(self) -> None:
        self._under_way: deque[Work] = deque()

    def add(self, work: Work) -> Work:
        """Returns the same sum, which completes after the earlier ones."""
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
    """Every member gets all tensors and adds them: one round of messages, for short buffers."""

    def __init__(self, flat: Tensor, messages: PointToPoint) -> None:
        self._flat = flat
        self._rows = flat.new_empty((messages.size, flat.numel()))
        own_row = self._rows[messages.rank]
        own_row.copy_(flat)
        self._works = _receive_rows(self._rows, messages)
        self._works += [messages.send(own_row, to=member) for member in _others(messages)]

    def wait(self) -> None:
        _wait(self._works)
        self._flat.copy_(_sum_rows(self._rows))


class SharedSum:
    """Each member sums its share of every slice, then sends the sum to all: two rounds."""

    def __init__(self, flat: Tensor, messages: PointToPoint, *, slice_bytes: int) -> None:
        parts = _slices(flat, slice_bytes)
        self._slices = (_SharedSlice(part, messages) for part in parts)
        self._current = next(self._slices, None)

    def wait(self) -> None:
        sends: list[Work] = []
        while self._current is not None:
            current, self._current = self._current, next(self._slices, None)
            sends += current.sum_and_share()
        _wait(sends)


class _SharedSlice:
    def __init__(self, flat: Tensor, messages: PointToPoint) -> None:
        self._messages = messages
        self._shares = flat.tensor_split(messages.size)
        self._own_share = self._shares[messages.rank]
        self._rows = self._own_share.new_empty((messages.size, self._own_share.numel()))
        self._rows[messages.rank] = self._own_share
        self._works = _receive_rows(self._rows, messages)
        for member in _others(messages):
            self._works.append(messages.send(self._shares[member], to=member))

    def sum_and_share(self) -> list[Work]:
        """Sums this member's share; returns the exchange of all members' sums, under way."""
        _wait(self._works)
        self._own_share.copy_(_sum_rows(self._rows))
        works = []
        for member in _others(self._messages):
            works.append(self._messages.receive(self._shares[member], source=member))
            works.append(self._messages.send(self._own_share, to=member))
        return works


class SumAtRoot:
    """The sum on the root member; the others have a SentToRoot."""

    def __init__(self, flat: Tensor, messages: PointToPoint, *, slice_bytes: int) -> None:
        self._slices = (_RootSlice(part, messages) for part in _slices(flat, slice_bytes))
        self._current = next(self._slices, None)

    def wait(self) -> None:
        while self._current is not None:
            current, self._current = self._current, next(self._slices, None)
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
    """The other members' side of a SumAtRoot; sends all slices at once, from the buffer."""

    def __init__(
        self, flat: Tensor, messages: PointToPoint, *, root: int, slice_bytes: int
    ) -> None:
        self._works = [messages.send(part, to=root) for part in _slices(flat, slice_bytes)]

    def wait(self) -> None:
        _wait(self._works)


def _slices(flat: Tensor, slice_bytes: int) -> Iterator[Tensor]:
    return iter(torch.split(flat, max(1, slice_bytes // flat.element_size())))


def _receive_rows(rows: Tensor, messages: PointToPoint) -> list[Work]:
    """Starts receiving row m from member m."""
    return [messages.receive(rows[member], source=member) for member in _others(messages)]


def _others(messages: PointToPoint) -> Iterator[int]:
    return (member for member in range(messages.size) if member != messages.rank)


def _sum_rows(rows: Tensor) -> Tensor:
    """Returns the sum over the first dimension, in its order; overwrites the rows."""
    total = rows[0]
    for row in rows[1:]:
        total += row
    return total


def _wait(works: Iterable[Work]) -> None:
    for work in works:
        work.wait()
