"""Simulated communicators and clocks, with which one process can test ClockSync."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monitor.profiling.clock_sync import ClockSync


class Alone:
    """Communicator of a world of one, in which any message is an error."""

    rank, size = 0, 1

    def send(self, tensor: Tensor, *, to: int) -> Any:
        raise AssertionError("a world of one must not send")

    def receive(self, tensor: Tensor, *, source: int) -> Any:
        raise AssertionError("a world of one must not receive")


class Wire(Alone):
    """Communicator of rank 1; rank 0, which is simulated, answers each message.

    trips: for each message, the nanoseconds of the way to rank 0 and of the way back.
    now: rank 1's clock; rank 0's clock shows `ahead` nanoseconds more.
    """

    rank, size = 1, 2

    def __init__(self, trips: Sequence[tuple[int, int]], *, now: int, ahead: int) -> None:
        self._trips, self.now, self.ahead = list(trips), now, ahead

    def clock(self) -> int:
        return self.now

    def send(self, tensor: Tensor, *, to: int) -> Any:
        assert to == 0
        return _Arrival(self, None)

    def receive(self, tensor: Tensor, *, source: int) -> Any:
        assert source == 0
        return _Arrival(self, tensor)

    def arrive(self, tensor: Tensor) -> None:
        there, back = self._trips.pop(0)
        tensor.copy_(torch.tensor([self.now + there + self.ahead]))
        self.now += there + back


class _Arrival:
    def __init__(self, wire: Wire, tensor: Tensor | None) -> None:
        self._wire, self._tensor = wire, tensor

    def wait(self) -> None:
        if self._tensor is not None:
            self._wire.arrive(self._tensor)


def clock_from(origin: int) -> ClockSync:
    """Returns rank 0's clock in a run that began at `origin`."""
    clock = ClockSync(lambda: origin)
    clock.measure(Alone())
    return clock
