"""One clock for all ranks: that of rank 0, which every rank reads through its own.

The offset of two clocks is estimated by ping-pong, as NTP does (Mills, RFC 5905): rank 0 read its
clock somewhere between ping and pong, so the offset is known to half a round trip; of many round
trips the shortest counts.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from monitor.profiling.tracer import Clock

ROUNDS = 16


class Work(Protocol):
    def wait(self) -> None: ...


class Group(Protocol):
    """What is needed of a channel between all processes: messages of small host tensors."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, tensor: Tensor, *, to: int) -> Work: ...

    def receive(self, tensor: Tensor, *, source: int) -> Work: ...


class ClockOffset(NamedTuple):
    """Add `offset` to this process's clock to get rank 0's, right to `error`; all nanoseconds.

    `at` is when it was estimated, by this process's clock.
    """

    at: int
    offset: int
    error: int


def clock_offset(group: Group, *, clock: Clock, rounds: int = ROUNDS) -> ClockOffset:
    """This process's offset to rank 0's clock; every member calls it.

    Rank 0 talks to one member after the other, so it takes `rounds` round trips for each.
    """
    if group.rank == 0:
        for peer in range(1, group.size):
            _answer(group, peer, clock, rounds)
        return ClockOffset(clock(), 0, 0)
    return min((_ask(group, clock) for _ in range(rounds)), key=lambda offset: offset.error)


class ClockSync:
    """Turns times of this process's clock into nanoseconds of the run.

    The run begins when rank 0 makes this object. Between two measurements the offset is taken to
    change evenly, so measuring at both ends of a run takes clocks into account that drift apart.
    """

    def __init__(self, clock: Clock = time.perf_counter_ns) -> None:
        self._clock, self._origin = clock, clock()
        self._offsets: list[ClockOffset] = []

    def measure(self, group: Group) -> None:
        """Estimates the offset to rank 0's clock; every member calls it, at least once."""
        if group.rank == 0:
            measured = clock_offset(group, clock=lambda: self._clock() - self._origin)
            self._offsets.append(ClockOffset(self._clock(), -self._origin, measured.error))
        else:
            self._offsets.append(clock_offset(group, clock=self._clock))

    @property
    def offset(self) -> int:
        """The last measured offset in nanoseconds."""
        return self._offsets[-1].offset

    @property
    def error(self) -> int:
        """How far a converted time may be off rank 0's clock where measured, in nanoseconds."""
        return max(offset.error for offset in self._offsets)

    def convert(self, moment: int) -> int:
        """A time of this process's clock as nanoseconds since the run began."""
        first, last = self._offsets[0], self._offsets[-1]
        if first.at == last.at:
            return moment + last.offset
        drift = (last.offset - first.offset) * (moment - first.at) // (last.at - first.at)
        return moment + first.offset + drift


def _answer(group: Group, peer: int, clock: Clock, rounds: int) -> None:
    ping = torch.zeros(1, dtype=torch.int64)
    for _ in range(rounds):
        group.receive(ping, source=peer).wait()
        group.send(torch.tensor([clock()]), to=peer).wait()


def _ask(group: Group, clock: Clock) -> ClockOffset:
    pong = torch.zeros(1, dtype=torch.int64)
    reply = group.receive(pong, source=0)
    asked = clock()
    group.send(torch.zeros(1, dtype=torch.int64), to=0).wait()
    reply.wait()
    answered = clock()
    middle = (asked + answered) // 2
    error = (answered - asked + 1) // 2
    return ClockOffset(middle, int(pong.item()) - middle, error)
