"""Clock synchronization: every rank converts its clock's times to the clock of rank 0.

A ping-pong estimates the offset of two clocks, as in NTP (Mills, RFC 5905). Rank 0 reads its clock
between ping and pong, so the error is at most half a round trip. The estimate uses the shortest of
several round trips.
"""

import time
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from monitor.profiling.tracer import Clock

ROUNDS = 16


class HostMessages(Protocol):
    """An interface to send small host tensors between ranks; every communicator implements it.

    `send` and `receive` return an object with a method `wait`.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, tensor: Tensor, *, to: int) -> Any: ...

    def receive(self, tensor: Tensor, *, source: int) -> Any: ...


class ClockOffset(NamedTuple):
    """The offset between this process's clock and rank 0's clock, in nanoseconds.

    at: the time of the estimate, by this process's clock.
    offset: rank 0's time minus this process's time.
    error: the largest possible error of `offset`.
    """

    at: int
    offset: int
    error: int


def clock_offset(messages: HostMessages, *, clock: Clock, rounds: int = ROUNDS) -> ClockOffset:
    """Returns the offset between the clocks of this process and rank 0; every rank calls this.

    Rank 0 answers one rank after another, with `rounds` round trips for each rank.
    """
    if messages.rank == 0:
        for peer in range(1, messages.size):
            _answer(messages, peer, clock, rounds)
        return ClockOffset(clock(), 0, 0)
    return min((_ask(messages, clock) for _ in range(rounds)), key=lambda offset: offset.error)


class ClockSync:
    """A converter from this process's clock to nanoseconds since the run began.

    The run begins when rank 0 creates its ClockSync. The offset to add is interpolated linearly
    between the first and the last measurement, so measurements at both ends of a run correct clock
    drift.
    """

    def __init__(self, clock: Clock = time.perf_counter_ns) -> None:
        self._clock, self._origin = clock, clock()
        self._offsets: list[ClockOffset] = []

    def measure(self, messages: HostMessages) -> None:
        """Estimates the offset to rank 0's clock; every rank calls this at least once."""
        if messages.rank == 0:
            measured = clock_offset(messages, clock=lambda: self._clock() - self._origin)
            self._offsets.append(ClockOffset(self._clock(), -self._origin, measured.error))
        else:
            self._offsets.append(clock_offset(messages, clock=self._clock))

    @property
    def offset(self) -> int:
        """The last measured offset: nanoseconds since the run began minus this clock's time."""
        return self._offsets[-1].offset

    @property
    def error(self) -> int:
        """The largest possible error of the measured offsets, in nanoseconds."""
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
