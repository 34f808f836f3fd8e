"""How the processes of a run meet: everyone tells who it is, differences end the run at once.

Every rank posts its arrival in a shared store. Whoever sees first how the meeting ends (rank 0
when all are there; any rank that sees a mistake or runs out of time) writes the verdict, once;
all ranks read that one verdict, so that they say the same and end alike. Each of these values
carries a proof that a rank of this job wrote it; ranks of other jobs are sent away at the door.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from comm.lifecycle.deadline import Deadline
from comm.lifecycle.stop_signals import NOT_BEGUN, STOPPED, StopAskedError, StopRequest
from comm.rendezvous.foreign_ranks import FLAGS, ForeignRanks
from comm.rendezvous.interface import Interface
from comm.rendezvous.job_key import JobKey
from comm.rendezvous.participants import Fact, Participant, find_mismatch
from comm.rendezvous.signed_store import SignedStore
from comm.rendezvous.store import host_store, reach_store

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_REPORT_SECONDS = 10.0
_ACKNOWLEDGE_SECONDS = 3.0
_LATE_SECONDS = 5.0
_ERRORS = {1: TimeoutError, 2: ValueError, STOPPED: StopAskedError}  # by a verdict's status


@dataclass(frozen=True)
class Rendezvous:
    """The result of a meeting.

    rank: this process's.
    roster: every rank's arrival, by rank.
    nonce: random hex that names this start.
    key: what all ranks of the job know, to prove who they are on connections of their own.
    sealed: values of this start, each with its proof (None in a world of one).
    watchdog: still running; `create_process_groups` cancels it when the groups exist.
    """

    rank: int
    roster: tuple[Participant, ...]
    nonce: str
    key: JobKey
    sealed: SignedStore | None
    watchdog: Deadline | None

    @classmethod
    def alone(cls) -> Rendezvous:
        """A world of one: no socket, no store."""
        here = Participant(0, socket.gethostname(), "", "", os.getpid(), {})
        return cls(0, (here,), secrets.token_hex(16), JobKey(""), None, None)

    @property
    def store(self) -> Store | None:
        """torch's store, under names that only this start's ranks can tell."""
        return None if self.sealed is None else self.sealed.store

    @property
    def ranks_on_this_host(self) -> tuple[int, ...]:
        """The ranks whose machine has this one's host name, this rank included."""
        host = self.roster[self.rank].host
        return tuple(arrival.rank for arrival in self.roster if arrival.host == host)


def join(
    *,
    url: str,
    rank: int,
    world_size: int,
    interface: Interface,
    facts: Mapping[str, Fact],
    key: JobKey,
    start: str,
    join_timeout: float,
    host: bool | None = None,
    stop: StopRequest | None = None,
) -> Rendezvous:
    """Meets the other ranks at `url`; `join_timeout` seconds are a hard deadline for all of it.

    `facts` (flag -> value) must be the same on all ranks; the world size is always one of them.
    Ranks with another `key` are of another job. `start` tells the job's starts on one store from
    each other (torchrun's restarts). `host` says whether this process holds the store; left out,
    rank 0 does (under torchrun its agent does, so it is False there). A request to `stop` ends the
    meeting for all that have come.

    Raises:
        ValueError: a user's mistake: the master is not there or of another job, its port is taken,
            facts differ, a rank is given twice.
        TimeoutError: ranks are missing at the deadline; the text names them.
        ConnectionError: the master went away while the ranks gathered, or something else writes to
            its store.
        StopAskedError: a rank was asked to stop.
    """
    here = Participant(
        rank=rank,
        host=socket.gethostname(),
        address=interface.address,
        interface=interface.name,
        pid=os.getpid(),
        facts={"--world-size": world_size, **facts},
    )
    watchdog = Deadline(join_timeout)
    meeting = _Meeting(url, here, world_size, watchdog, stop or StopRequest())
    try:
        store = meeting.open(host=rank == 0 if host is None else host)
        return meeting.gather(store, key, start)
    except DistError as error:
        watchdog.cancel()
        raise ConnectionError(
            f"the master at {url} went away while the ranks were joining; see rank 0's message"
        ) from error
    except (ValueError, OSError, StopAskedError):
        watchdog.cancel()
        raise


class _Meeting:
    """One rank's part in the gathering."""

    def __init__(
        self,
        url: str,
        here: Participant,
        world_size: int,
        watchdog: Deadline,
        stop: StopRequest,
    ) -> None:
        self._url = url
        self._stop = stop
        self._here = here
        self._world_size = world_size
        self._watchdog = watchdog
        self._master = f"the master at {url} over {here.interface}"
        self._reported = 0.0

    def open(self, *, host: bool) -> Store:
        """The store at the master, hosted here or elsewhere."""
        if host:
            address = self._here.address
            return host_store(self._url, address=address, watchdog=self._watchdog)
        return reach_store(
            self._url,
            address=self._here.address,
            watchdog=self._watchdog,
            waiting=self._await_master,
        )

    def _await_master(self) -> None:
        if self._stop.asked is not None:
            raise StopAskedError(f"{self._stop.asked} {NOT_BEGUN}")
        self._report(f"waiting for {self._master}")

    def gather(self, plain: Store, key: JobKey, start: str) -> Rendezvous:
        """Arrives, waits for the verdict, and takes it."""
        store = SignedStore(plain, key, start=start)
        door = ForeignRanks(plain, key, here=self._here, url=self._url)
        if self._here.rank == 0:
            door.open()
        door.check()
        self._arrive(store)
        self._await_verdict(store, door)
        verdict = json.loads(store.get("verdict"))
        if "error" in verdict:
            too_late = verdict["status"] == 1
            self._part(store, late_seconds=0.0 if too_late else _LATE_SECONDS)
            raise _ERRORS[verdict["status"]](verdict["error"])
        self._watchdog.expect(status=1, line=self._unconnected())
        roster = tuple(self._arrival(store, rank) for rank in range(self._world_size))
        return Rendezvous(self._here.rank, roster, verdict["nonce"], key, store, self._watchdog)

    def _arrive(self, store: SignedStore) -> None:
        mine = self._here.to_json()
        there = store.set_first(_name(self._here.rank), mine)
        if there != mine:
            other = Participant.from_json(there)
            problem = (
                f"--rank {self._here.rank}: two processes have it, on host {other.host} (pid "
                f"{other.pid}) and on host {self._here.host} (pid {self._here.pid})"
            )
            _conclude(store, error=problem, status=2)
            raise ValueError(problem)

    def _await_verdict(self, store: SignedStore, door: ForeignRanks) -> None:
        fits = False
        while not store.has("verdict"):
            if self._stop.asked is not None:
                _conclude(store, error=f"{self._stop.asked} {NOT_BEGUN}", status=STOPPED)
                return
            door.check()
            door.look()
            missing = self._missing(store)
            if not fits and 0 not in missing:
                fits = self._compare(store, [0, self._here.rank])
            if self._here.rank == 0 and not missing:
                if self._compare(store, range(self._world_size)):
                    _conclude(store, nonce=secrets.token_hex(16))
                return
            self._wait(store, missing, door.strangers)

    def _compare(self, store: SignedStore, ranks: list[int] | range) -> bool:
        problem = find_mismatch([self._arrival(store, rank) for rank in ranks])
        if problem:
            _conclude(store, error=problem, status=2)
        return problem is None

    def _wait(self, store: SignedStore, missing: list[int], strangers: list[str]) -> None:
        names = ", ".join(f"rank {rank}" for rank in missing) or "rank 0's answer"
        problem = (
            f"{names} did not join at {self._url} within {self._watchdog.seconds:g} s "
            "(--join-timeout): start every rank, and see the messages of those that ended"
        )
        if strangers:
            problem += f"; {', '.join(strangers)} came with another {FLAGS}"
        self._watchdog.expect(status=1, line=f"rank {self._here.rank}: {problem}")
        if self._watchdog.left <= 0:
            _conclude(store, error=problem, status=1)
            return
        joined = "" if self._here.rank == 0 else f"joined {self._master}; "
        self._report(f"{joined}waiting for {names}")
        time.sleep(_POLL_SECONDS)

    def _missing(self, store: SignedStore) -> list[int]:
        ranks = range(self._world_size)
        if store.has(*map(_name, ranks)):
            return []
        return [rank for rank in ranks if not store.has(_name(rank))]

    def _part(self, store: SignedStore, *, late_seconds: float) -> None:
        """The host of the store stays until the others have read the verdict.

        For ranks that have not arrived yet it stays `late_seconds`.
        """
        began = time.monotonic()
        with contextlib.suppress(DistError):
            store.add("parted", 1)
            while self._here.rank == 0:
                parted, waited = store.add("parted", 0), time.monotonic() - began
                arrived = self._world_size - len(self._missing(store))
                awaited = self._world_size if waited < late_seconds else arrived
                if parted >= awaited or waited > max(late_seconds, _ACKNOWLEDGE_SECONDS):
                    return
                time.sleep(_POLL_SECONDS)

    def _arrival(self, store: SignedStore, rank: int) -> Participant:
        return Participant.from_json(store.get(_name(rank)))

    def _unconnected(self) -> str:
        return (
            f"rank {self._here.rank}: the ranks met at {self._url} but could not all connect to "
            f"each other within {self._watchdog.seconds:g} s (--join-timeout), this one over "
            f"{self._here.interface}: is --net-interface right, and do firewalls let them through?"
        )

    def _report(self, what: str) -> None:
        if self._watchdog.waited - self._reported >= _REPORT_SECONDS:
            self._reported = self._watchdog.waited
            logger.warning("%s (%s)", what, self._watchdog.progress)


def _name(rank: int) -> str:
    return f"arrival/{rank}"


def _conclude(store: SignedStore, **verdict: str | int) -> None:
    """Writes the verdict unless there is one."""
    store.set_first("verdict", json.dumps(verdict))
