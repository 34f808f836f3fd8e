"""The links of a run, and their speeds, measured with the communicator of training.

Times are read only from the sender's clock. The time of a message is the seconds from the start of
its send to the arrival of a short answer, minus half the round-trip time of short messages. The
latency is also half this round-trip time. So if only one direction has a delay, the latency of each
direction contains half of this delay. A low rate (bytes per second) of one direction changes only
the result of this direction. As in training, the receive is posted before the send starts.
"""

import statistics
import time
from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import NamedTuple

import torch

from comm.communicator import PointToPoint
from comm.topology import Topology
from common.tensors import synchronize

_SHORT = 8  # bytes
_FIRST = 4096  # bytes of the first message that measures a rate
_GROWTH = 16
_ROUNDS = 20
_REPEATS = 5


class Link(NamedTuple):
    """A connection from one global rank to another, in the group `pipeline` or `replicas`."""

    group: str
    source: int
    to: int


def links(topology: Topology) -> list[Link]:
    """Returns all links of a run, in both directions.

    The links between the stages of each pipeline come first, and then the links between the
    replicas of each stage. All pairs of a stage's replicas are links, because each replica receives
    a share of the gradients from all other replicas.
    """
    run_links: list[Link] = []
    for replica in range(topology.num_replicas):
        run_links += _both_ways("pipeline", pairwise(topology.pipeline_ranks(replica)))
    for stage in range(topology.num_stages):
        run_links += _both_ways("replicas", combinations(topology.replica_ranks(stage), 2))
    return run_links


def _both_ways(group: str, pairs: Iterable[tuple[int, int]]) -> list[Link]:
    return [Link(group, *ends) for a, b in pairs for ends in ((a, b), (b, a))]


class LinkSpeed(NamedTuple):
    """The measured speed of a link.

    Attributes:
        latency: the seconds of a message of a few bytes.
        nbytes: the bytes of the largest message that was measured.
        seconds: the seconds of a message of `nbytes` bytes, latency included.
    """

    latency: float
    nbytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Returns the rate of consecutive messages of `self.nbytes` bytes."""
        return self.nbytes / self.seconds

    def message_seconds(self, nbytes: int) -> float:
        """Returns the seconds of a message: the latency, and a part proportional to `nbytes`."""
        if nbytes == self.nbytes:
            return self.seconds
        return self.latency + max(0.0, self.seconds - self.latency) * nbytes / self.nbytes


def probe(
    group: PointToPoint, *, to: int, nbytes: int, device: torch.device, budget: float
) -> LinkSpeed:
    """Measures the speed of the link to member `to`, which must call `answer` at the same time.

    Args:
        nbytes: the size of the largest message; on a slow link, only smaller messages are sent.
        budget: the approximate seconds for all messages.
    """
    prober = _Prober(group, to, device)
    began = time.monotonic()

    def left() -> float:
        return budget - (time.monotonic() - began)

    prober.round(_SHORT)  # warms up
    round_trips = [prober.round(_SHORT)]
    while len(round_trips) < _ROUNDS and left() > 3 * budget / 4:
        round_trips.append(prober.round(_SHORT))
    latency = statistics.median(round_trips) / 2
    size = min(_FIRST, nbytes)
    while True:
        seconds = max(prober.round(size) - latency, latency)
        following = min(size * _GROWTH, nbytes)
        expected = LinkSpeed(latency, size, seconds).message_seconds(following)
        if size == nbytes or expected > left():
            break
        size = following
    repeats = [seconds]
    while len(repeats) < _REPEATS and left() > repeats[-1]:
        repeats.append(prober.round(size) - latency)
    prober.announce(0)
    return LinkSpeed(latency, size, max(statistics.median(repeats), latency))


def answer(group: PointToPoint, *, source: int, device: torch.device) -> None:
    """Answers the messages of `probe` until `probe` ends the measurement."""
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
    """The sender of the messages on one link."""

    def __init__(self, group: PointToPoint, peer: int, device: torch.device) -> None:
        self._group, self._peer, self._device = group, peer, device
        self._word = torch.empty(_SHORT, dtype=torch.uint8, device=device)

    def round(self, size: int) -> float:
        """Sends `size` bytes; returns the seconds from the start of the message to its answer."""
        self.announce(size)
        message = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._receive_word()
        began = time.perf_counter()
        work = self._group.send(message, to=self._peer)
        self._receive_word()
        seconds = time.perf_counter() - began
        work.wait()
        return seconds

    def announce(self, size: int) -> None:
        """Sends the size of the next message; 0 ends the measurement."""
        header = torch.tensor([size], device=self._device)
        self._group.send(header, to=self._peer).wait()
        synchronize(self._device)

    def _receive_word(self) -> None:
        self._group.receive(self._word, source=self._peer).wait()
        synchronize(self._device)
