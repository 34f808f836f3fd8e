"""Tests the events that the failure detector reports; no failure policy acts on the events."""

import queue
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from comm.lifecycle.deadline import Deadline
from comm.lifecycle.stop_signals import StopCause
from comm.liveness.failure_detector import Event, FailureDetector, RankFailed, RankLost
from comm.rendezvous.job_key import JobKey
from comm.rendezvous.join import Rendezvous
from comm.rendezvous.participants import Participant
from comm.rendezvous.signed_store import SignedStore

NUM_RANKS = 3


class Rank:
    """A rank with a failure detector, whose events are only recorded."""

    def __init__(self, rank: int, store: SignedStore) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.detector = FailureDetector(rank, self.events.put)
        deadline = Deadline(10.0)
        deadline.cancel()
        participants = tuple(
            Participant(each, "host", "127.0.0.1", "lo", 1, {}) for each in range(NUM_RANKS)
        )
        self._rendezvous = Rendezvous(rank, participants, "nonce", JobKey("a"), store, deadline)

    def connect(self) -> list[int]:
        return self.detector.connect(self._rendezvous, master="rank 0")

    def next_event(self) -> Event:
        return self.events.get(timeout=10.0)

    def die(self) -> None:
        """Closes the connection, as the system does for a killed process."""
        connection = self.detector._connection
        assert connection is not None
        connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    store = SignedStore(HashStore(), JobKey("a"), start="")
    ranks = [Rank(rank, store) for rank in range(NUM_RANKS)]
    with ThreadPoolExecutor(NUM_RANKS) as pool:
        assert list(pool.map(Rank.connect, ranks)) == [[]] * NUM_RANKS
    yield ranks
    for rank in reversed(ranks):
        rank.detector.close()


def test_a_lost_rank_is_an_event_on_every_other(ranks: list[Rank]) -> None:
    ranks[2].die()
    for rank in ranks[:2]:
        assert rank.next_event() == RankLost(2, "its connection closed unexpectedly")
        assert rank.events.empty()
        assert rank.detector.all_alive(), "the others still answer"


def test_a_failure_is_an_event_on_every_rank(ranks: list[Rank]) -> None:
    ranks[1].detector.publish_failure(2, "--x 3: must be less")
    for rank in ranks:
        assert rank.next_event() == RankFailed(1, 2, "--x 3: must be less")


def test_a_request_to_stop_is_an_event_on_rank_0(ranks: list[Rank]) -> None:
    ranks[2].detector.forward_stop(15)
    assert ranks[0].next_event() == StopCause(2, 15)
    assert ranks[1].events.empty()


def test_in_good_order_no_rank_is_lost(ranks: list[Rank]) -> None:
    ranks[1].detector.close()
    assert ranks[0].detector.all_alive()
    assert all(rank.events.empty() for rank in ranks)
