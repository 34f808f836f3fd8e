"""Clock synchronization: every rank converts times of its own clock to the clock of rank 0.

The offset of two clocks is estimated by ping-pong, as in NTP (Mills, RFC 5905): rank 0 reads its
clock at some time between ping and pong, so the error is at most half a round trip. The shortest of
many round trips is used.
"""

import time
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from monitor.profiling.tracer import Clock

ROUNDS = 16


class HostMessages(Protocol):
    """Messages of small host tensors between ranks, as every communicator has them.

    `send` and `receive` return an object with `wait`.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, tensor: Tensor, *, to: int) -> Any: ...

    def receive(self, tensor: Tensor, *, source: int) -> Any: ...


class ClockOffset(NamedTuple):
    """The offset of this process's clock to rank 0's, in nanoseconds.

    at: the time of the estimate, by this process's clock.
    offset: is added to this process's clock to get rank 0's.
    error: the largest possible error of `offset`.
    """

    at: int
    offset: int
    error: int


def clock_offset(messages: HostMessages, *, clock: Clock, rounds: int = ROUNDS) -> ClockOffset:
    """Returns this process's offset to rank 0's clock; every rank calls it.

    Rank 0 serves one rank after the other, with `rounds` round trips each.
    """
    if messages.rank == 0:
        for peer in range(1, messages.size):
            _answer(messages, peer, clock, rounds)
        return ClockOffset(clock(), 0, 0)
    return min((_ask(messages, clock) for _ in range(rounds)), key=lambda offset: offset.error)


class ClockSync:
    """A converter of times of this process's clock into nanoseconds of the run.

    The run begins when rank 0 creates this object. Between the first and the last measurement the
    offset is interpolated linearly, so measurements at both ends of a run correct for clock drift.
    """

    def __init__(self, clock: Clock = time.perf_counter_ns) -> None:
        self._clock, self._origin = clock, clock()
        self._offsets: list[ClockOffset] = []

    def measure(self, messages: HostMessages) -> None:
        """Estimates the offset to rank 0's clock; every rank calls it, at least once."""
        if messages.rank == 0:
            measured = clock_offset(messages, clock=lambda: self._clock() - self._origin)
            self._offsets.append(ClockOffset(self._clock(), -self._origin, measured.error))
        else:
            self._offsets.append(clock_offset(messages, clock=self._clock))

    @property
    def offset(self) -> int:
        """The last measured offset, in nanoseconds."""
        return self._offsets[-1].offset

    @property
    def error(self) -> int:
        """The largest possible error of a converted time when measured, in nanoseconds."""
        return max(offset.error for offset in self._offsets)

    def convert(self, moment: int) -> int:
        """Converts a time of this process's clock to nanoseconds since the run began."""
        first, last = self._offsets[0], self._offsets[-1]
        if first.at == last.at:
            return moment + last.offset
        drift = (last.offset - first.offset) * (moment - first.at) // (last.at - first.at)
        return moment + first.offset + drift


def _answer(messages: HostMessages, peer: int, clock: Clock, rounds: int) -> None:
    ping = torch.zeros(1, dtype=torch.int64)
    for _ in range(rounds):
        messages.receive(ping, source=peer).wait()
        messages.send(torch.tensor([clock()]), to=peer).wait()


def _ask(messages: HostMessages, clock: Clock) -> ClockOffset:
    pong = torch.zeros(1, dtype=torch.int64)
    reply = messages.receive(pong, source=0)
    sent = clock()
    messages.send(torch.zeros(1, dtype=torch.int64), to=0).wait()
    reply.wait()
    received = clock()
    middle = (sent + received) // 2
    error = (received - sent + 1) // 2
    return ClockOffset(middle, int(pong.item()) - middle, error)
