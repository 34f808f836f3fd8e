"""What messages take from one member of a group to another, over the very channel that trains.

The sender's clock alone measures: from the start of a message until a short answer comes back, less
half a round trip of two short ones: a delay of one direction alone counts half in each, a low rate
where it is. The receiver is ready before, as in training, where receives are posted ahead of need.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from comm.communicator import PointToPoint
from common.tensors import synchronize

_SHORT = 8  # bytes
_FIRST = 4096  # bytes of the first message that tells a rate
_GROWTH = 16
_ROUNDS = 20
_REPEATS = 5


@dataclass(frozen=True)
class LinkSpeed:
    """Measured: `latency`, the seconds of a message of a few bytes, and the `seconds` of one of
    `nbytes`, latency included."""

    latency: float
    nbytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """What comes through of messages of this size, one after the other."""
        return self.nbytes / self.seconds

    def message_seconds(self, nbytes: int) -> float:
        """What a message of `nbytes` takes: what is beyond the latency grows with its length."""
        if nbytes == self.nbytes:
            return self.seconds
        return self.latency + max(0.0, self.seconds - self.latency) * nbytes / self.nbytes


def probe(
    group: PointToPoint, *, to: int, nbytes: int, device: torch.device, budget: float
) -> LinkSpeed:
    """The speed towards member `to`, who calls `answer` meanwhile.

    Messages of up to `nbytes` are sent, of fewer where those would take longer than about `budget`
    seconds in all. PeerLostError as of the channel.
    """
    prober = _Prober(group, to, device)
    began = time.monotonic()

    def left() -> float:
        return budget - (time.monotonic() - began)

    prober.round(_SHORT)  # wakes what sleeps
    latency = _median(lambda: prober.round(_SHORT), _ROUNDS, lambda: left() > 3 * budget / 4) / 2
    size = min(_FIRST, nbytes)
    while True:
        seconds = max(prober.round(size) - latency, latency)
        following = min(size * _GROWTH, nbytes)
        expected = LinkSpeed(latency, size, seconds).message_seconds(following)
        if size == nbytes or expected > left():
            break
        size = following
    again = [seconds]
    while len(again) < _REPEATS and left() > again[-1]:
        again.append(prober.round(size) - latency)
    prober.end()
    return LinkSpeed(latency, size, max(statistics.median(again), latency))


def answer(group: PointToPoint, *, source: int, device: torch.device) -> None:
    """The other end of `probe`, until it is through."""
    header = torch.empty(1, dtype=torch.int64, device=device)
    word = torch.zeros(_SHORT, dtype=torch.uint8, device=device)
    while True:
        group.receive(header, source=source).wait()
        size = int(header.item())
        if size == 0:
            return
        message = torch.empty(size, dtype=torch.uint8, device=device)
        work = group.receive(message, source=source)
        group.send(word, to=source).wait()
        work.wait()
        synchronize(device)
        group.send(word, to=source).wait()


class _Prober:
    """The sender's end of one link."""

    def __init__(self, group: PointToPoint, peer: int, device: torch.device) -> None:
        self._group, self._peer, self._device = group, peer, device
        self._word = torch.empty(_SHORT, dtype=torch.uint8, device=device)

    def round(self, size: int) -> float:
        """Seconds from the start of a message of `size` bytes to its answer."""
        self._announce(size)
        message = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._hear()
        began = time.perf_counter()
        work = self._group.send(message, to=self._peer)
        self._hear()
        seconds = time.perf_counter() - began
        work.wait()
        return seconds

    def end(self) -> None:
        self._announce(0)

    def _announce(self, size: int) -> None:
        header = torch.tensor([size], device=self._device)
        self._group.send(header, to=self._peer).wait()
        synchronize(self._device)

    def _hear(self) -> Tensor:
        self._group.receive(self._word, source=self._peer).wait()
        synchronize(self._device)
        return self._word


def _median(measure: Callable[[], float], most: int, may_go_on: Callable[[], bool]) -> float:
    """Of up to `most` measurements, of one at least."""
    found = [measure()]
    while len(found) < most and may_go_on():
        found.append(measure())
    return statistics.median(found)
