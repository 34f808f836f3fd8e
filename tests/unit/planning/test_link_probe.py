"""Tests the link probe on links of known latency and rate, with a simulated clock."""

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from comm.communicator import Done, Work
from comm.topology import Topology
from planning.cluster.check import measure_links
from planning.cluster.link_probe import Link, LinkSpeed, links, probe
from tests.support.connected import enter
from tests.support.launcher import free_port, run_ranks
from tests.support.nccl_double import nccl_double
from tests.support.torch_nccl_double import gloo_for_nccl

CPU = torch.device("cpu")
WORDS = 8  # bytes of the probe's short messages
AMPLE_SECONDS = 60.0  # a budget that also a very busy machine does not use up


class KnownLink:
    """Both ends of a simulated link; each send and each receive advances the link's clock."""

    def __init__(self, *, latency: float, rate: float) -> None:
        self._latency, self._rate = latency, rate
        self.now, self.sizes = 0.0, [0]

    rank, size = 0, 2

    def send(self, tensor: Tensor, *, to: int) -> Work:
        assert to == 1
        self.now += self._latency + tensor.nbytes / self._rate
        if tensor.dtype == torch.uint8:
            self.sizes.append(tensor.nbytes)
        return Done()

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        assert source == 1
        self.now += self._latency + tensor.nbytes / self._rate
        return Done()


@pytest.fixture
def slow() -> Iterator[KnownLink]:
    """Yields a link with a latency of 0.1 s in each direction and a rate of 1 kB/s."""
    link = KnownLink(latency=0.1, rate=1e3)
    clock = SimpleNamespace(monotonic=lambda: link.now, perf_counter=lambda: link.now)
    with patch("planning.cluster.link_probe.time", clock):
        yield link


def test_a_message_of_full_size(slow: KnownLink) -> None:
    found = probe(slow, to=1, nbytes=5000, device=CPU, budget=1000.0)
    assert found.latency == pytest.approx(0.1 + WORDS / 1e3)
    assert found.nbytes == 5000
    assert found.seconds == pytest.approx(0.1 + 5.0)
    assert found.message_seconds(5000) == found.seconds
    assert found.bytes_per_second == pytest.approx(5000 / 5.1)


def test_a_slow_link_gets_shorter_messages(slow: KnownLink) -> None:
    """If a megabyte would take 1000 s, the probe sends a few kilobytes and extrapolates."""
    found = probe(slow, to=1, nbytes=10**6, device=CPU, budget=20.0)
    assert found.nbytes == 4096 == max(slow.sizes)
    assert slow.now < 25.0
    assert found.message_seconds(10**6) == pytest.approx(1000.0, rel=0.01)


def test_messages_grow_as_long_as_time_is_left(slow: KnownLink) -> None:
    probe(slow, to=1, nbytes=10**6, device=CPU, budget=400.0)
    assert max(slow.sizes) == 16 * 4096, "this takes 66 s; the next size would take 1000 s"
    assert slow.now < 420.0


def test_a_message_of_another_size_takes_latency_and_its_share() -> None:
    speed = LinkSpeed(latency=1.0, nbytes=100, seconds=3.0)
    assert speed.message_seconds(200) == 1.0 + 2 * 2.0
    assert speed.message_seconds(50) == 1.0 + 1.0


def test_the_links_of_a_run() -> None:
    """A run's links join neighbours in a pipeline and replicas of a stage, in both directions."""
    assert links(Topology(0, 1, 1)) == []
    pairs = [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert links(Topology(0, 3, 1)) == [Link("pipeline", *pair) for pair in pairs]
    of_replicas = [(link.source, link.to) for link in links(Topology(0, 1, 3))]
    assert of_replicas == [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    onwards = [Link("pipeline", 0, 1), Link("pipeline", 2, 3)]
    onwards += [Link("replicas", 0, 2), Link("replicas", 1, 3)]
    assert links(Topology(0, 2, 2))[::2] == onwards


def measure_all(rank: int, world_size: int, _: str, urls: dict[str, str]) -> list[Any]:
    """Measures links between three replicas with each backend; afterwards, checks an all-reduce."""
    found = []
    for backend, url in urls.items():
        with ExitStack() as doubles:
            if backend == "cupy_nccl":
                doubles.enter_context(nccl_double())
            if backend == "nccl":
                doubles.enter_context(gloo_for_nccl())
            entered = enter(
                rank,
                url,
                num_stages=1,
                num_replicas=world_size,
                dist_backend=backend,
                measures_links=True,
            )
            doubles.enter_context(patch("planning.cluster.check._LINK_SECONDS", AMPLE_SECONDS))
            wanted = dict.fromkeys(links(entered.topology), 300_000)
            speeds = measure_links(
                entered.topology, entered.groups, wanted, CPU, dist_timeout=4 * AMPLE_SECONDS
            )
            total = torch.tensor(rank + 1)
            entered.groups.replicas.all_reduce(total).wait()
            assert total.item() == 6, "the probe leaves nothing behind"
            entered.close()
        found.append(speeds)
    return found


def test_real_channels() -> None:
    """Every rank gets the same speeds for all links between three replicas, with every backend."""
    urls = {backend: f"tcp://127.0.0.1:{free_port()}" for backend in ("gloo", "cupy_nccl", "nccl")}
    by_rank = run_ranks(3, measure_all, urls)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    for speeds in by_rank[0]:
        assert list(speeds) == links(Topology(0, 1, 3))
        for speed in speeds.values():
            assert speed.nbytes == 300_000
            assert 0 < speed.latency <= speed.seconds < AMPLE_SECONDS
