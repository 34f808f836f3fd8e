"""Rendezvous of all ranks at the start of a run; a mismatch between ranks ends all of them.

Every rank writes a description of itself to a shared store. Then all wait for a verdict. Rank 0
writes success when all ranks have joined and match. Any rank that finds a mistake, reaches the
deadline or is asked to stop writes an error. Only the first verdict counts. All ranks read it, so
they report the same error and exit with the same status.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from comm.lifecycle.deadline import Deadline
from comm.lifecycle.stop_signals import NOT_BEGUN, STOPPED, StopAskedError, StopRequest
from comm.rendezvous.interface import Interface
from comm.rendezvous.job_key import JobKey
from comm.rendezvous.participants import Fact, Participant, find_mismatch
from comm.rendezvous.signed_store import SignedStore, foreign_value
from comm.rendezvous.store import connect_to_store, host_store
from comm.timing import DEFAULT_TIMING, Timing

logger = logging.getLogger(__name__)

_ERRORS = {1: TimeoutError, 2: ValueError, STOPPED: StopAskedError}  # keys: exit statuses
_VERDICT, _NUM_READ = "verdict", "read"


@dataclass(frozen=True)
class Rendezvous:
    """The result of a rendezvous.

    rank: the rank of this process.
    participants: the description of every rank, in the order of the ranks.
    nonce: random hex that identifies this start of the run.
    key: the key of the job; the handshakes of the liveness connections use it.
    store: the store where the ranks met; None in a world of one rank.
    deadline: the join deadline; `create_process_groups` cancels the deadline when the groups exist.
        None in a world of one rank.
    """

    rank: int
    participants: tuple[Participant, ...]
    nonce: str
    key: JobKey
    store: SignedStore | None
    deadline: Deadline | None

    @classmethod
    def alone(cls) -> "Rendezvous":
        """Returns the rendezvous of a world of one rank, without socket and store."""
        participant = Participant(0, socket.gethostname(), "", "", os.getpid(), {})
        return cls(0, (participant,), secrets.token_hex(16), JobKey(""), None, None)

    @property
    def ranks_on_this_host(self) -> tuple[int, ...]:
        """The ranks on machines with this machine's host name, this rank included."""
        host = self.participants[self.rank].host
        return tuple(other.rank for other in self.participants if other.host == host)


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
    timing: Timing = DEFAULT_TIMING,
) -> Rendezvous:
    """Joins the other ranks and waits for the verdict.

    Args:
        url: --dist-url, the address of the master, which is the process that hosts the store.
        facts: flag -> value; must be the same on all ranks. `join` adds the world size.
        key: the key of the job; a rank with another key belongs to another job.
        start: a name that all ranks of this start of the run share. When torchrun restarts the
            ranks, they use the same store again, so the new start needs a new name.
        join_timeout: a limit in seconds; if not all ranks are connected by then, the process ends.
        host: whether this process hosts the store; None: rank 0 hosts it. Under torchrun the agent
            hosts the store, so `host` is False.
        stop: `join` polls it; when it holds a stop request, the rendezvous of all ranks ends.

    Raises:
        ValueError: a user's mistake: no master answers, the master belongs to another job, the
            master's port is in use, facts differ, or two processes have the same rank.
        TimeoutError: ranks are missing at the deadline; the text names the missing ranks.
        ConnectionError: the master ended while the ranks joined, or another program writes to the
            store.
        StopAskedError: a rank was asked to stop.
    """
    place = (socket.gethostname(), interface.address, interface.name, os.getpid())
    participant = Participant(rank, *place, {"--world-size": world_size, **facts})
    deadline = Deadline(join_timeout, grace=timing.join_grace)
    joining = _Joining(url, participant, world_size, deadline, stop or StopRequest(), timing)
    try:
        store = joining.open_store(host=rank == 0 if host is None else host)
        return joining.join(SignedStore(store, key, start=start), key)
    except DistError as error:
        deadline.cancel()
        raise ConnectionError(
            f"lost the connection to the master at {url} while ranks joined; see rank 0's message"
        ) from error
    except (ValueError, OSError, StopAskedError):
        deadline.cancel()
        raise


class _Joining:
    """The rendezvous from the view of one rank."""

    def __init__(
        self,
        url: str,
        participant: Participant,
        world_size: int,
        deadline: Deadline,
        stop: StopRequest,
        timing: Timing,
    ) -> None:
        self._url = url
        self._timing = timing
        self._stop = stop
        self._participant = participant
        self._rank = participant.rank
        self._world_size = world_size
        self._deadline = deadline
        self._master = f"the master at {url} over {participant.interface}"
        self._last_report = 0.0

    def open_store(self, *, host: bool) -> Store:
        """Returns the store: hosts it if `host` is true, else connects to the master."""
        address = self._participant.address
        if host:
            return host_store(self._url, address=address, deadline=self._deadline)
        return connect_to_store(
            self._url, address=address, deadline=self._deadline, on_retry=self._await_master
        )

    def _await_master(self) -> None:
        if self._stop.asked is not None:
            raise StopAskedError(f"{self._stop.asked} {NOT_BEGUN}")
        self._report(f"waiting for {self._master}")

    def join(self, store: SignedStore, key: JobKey) -> Rendezvous:
        """Posts this rank's description, waits for the verdict, and raises it if it is an error."""
        if self._rank == 0:
            store.prove_job(self._participant.host)
        self._register(store)
        self._await_verdict(store)
        verdict = json.loads(store.get(_VERDICT))
        if "error" in verdict:
            is_late = verdict["status"] == 1
            self._await_readers(store, late_seconds=0.0 if is_late else self._timing.late)
            raise _ERRORS[verdict["status"]](verdict["error"])
        self._deadline.expect(status=1, line=self._unconnected())
        participants = _read(store, range(self._world_size))
        return Rendezvous(self._rank, participants, verdict["nonce"], key, store, self._deadline)

    def _register(self, store: SignedStore) -> None:
        description = self._participant.to_json()
        posted = store.plain.compare_set(_name(self._rank), "", description)
        if posted != description.encode():
            (other,) = _read(store, [self._rank])
            problem = (
                f"--rank {self._rank}: two processes have it, on host {other.host} (pid "
                f"{other.pid}) and on host {self._participant.host} (pid {self._participant.pid})"
            )
            _conclude(store, error=problem, status=2)
            raise ValueError(problem)

    def _await_verdict(self, store: SignedStore) -> None:
        is_of_this_job = self._rank == 0
        matches = False
        while not store.plain.check([_VERDICT]):
            if self._stop.asked is not None:
                _conclude(store, error=f"{self._stop.asked} {NOT_BEGUN}", status=STOPPED)
                return
            is_of_this_job = is_of_this_job or store.check_job(
                url=self._url, rank=self._rank, host=self._participant.host
            )
            missing = self._missing(store)
            if not matches and 0 not in missing:
                matches = self._compare(store, [0, self._rank])
            if self._rank == 0 and not missing:
                if self._compare(store, range(self._world_size)):
                    _conclude(store, nonce=secrets.token_hex(16))
                return
            self._wait(store, missing)

    def _compare(self, store: SignedStore, ranks: Sequence[int]) -> bool:
        problem = find_mismatch(_read(store, ranks))
        if problem:
            _conclude(store, error=problem, status=2)
        return problem is None

    def _wait(self, store: SignedStore, missing: list[int]) -> None:
        names = ", ".join(f"rank {rank}" for rank in missing) or "rank 0's answer"
        problem = (
            f"{names} did not join at {self._url} within {self._deadline.seconds:g} s "
            "(--join-timeout): start every rank, and see the messages of those that ended"
        )
        self._deadline.expect(status=1, line=f"rank {self._rank}: {problem}")
        if self._deadline.remaining <= 0:
            _conclude(store, error=problem, status=1)
            return
        joined = "" if self._rank == 0 else f"joined {self._master}; "
        self._report(f"{joined}waiting for {names}")
        time.sleep(self._timing.poll)

    def _missing(self, store: SignedStore) -> list[int]:
        ranks = range(self._world_size)
        if store.plain.check([_name(rank) for rank in ranks]):
            return []
        return [rank for rank in ranks if not store.plain.check([_name(rank)])]

    def _await_readers(self, store: SignedStore, *, late_seconds: float) -> None:
        """Tells rank 0 that this rank has read the verdict; on rank 0, waits for all ranks.

        Rank 0 waits because it may host the store, which ends with its host. It waits at most
        `late_seconds` for ranks that have not joined yet.
        """
        began = time.monotonic()
        with contextlib.suppress(DistError):
            store.plain.add(_NUM_READ, 1)
            while self._rank == 0:
                num_read, waited = store.plain.add(_NUM_READ, 0), time.monotonic() - began
                num_joined = self._world_size - len(self._missing(store))
                num_awaited = self._world_size if waited < late_seconds else num_joined
                if num_read >= num_awaited or waited > max(late_seconds, self._timing.acknowledge):
                    return
                time.sleep(self._timing.poll)

    def _unconnected(self) -> str:
        return (
            f"rank {self._rank}: the ranks met at {self._url} but could not all connect to "
            f"each other within {self._deadline.seconds:g} s (--join-timeout), this one over "
            f"{self._participant.interface}: is --net-interface right, and do firewalls let them "
            "through?"
        )

    def _report(self, what: str) -> None:
        if self._deadline.elapsed - self._last_report >= self._timing.report:
            self._last_report = self._deadline.elapsed
            logger.warning("%s (%s)", what, self._deadline.progress)


def _name(rank: int) -> str:
    return f"rank/{rank}"


def _read(store: SignedStore, ranks: Sequence[int]) -> tuple[Participant, ...]:
    try:
        return tuple(Participant.from_json(store.plain.get(_name(rank))) for rank in ranks)
    except (ValueError, TypeError) as error:
        raise foreign_value("a description of a rank") from error


def _conclude(store: SignedStore, **verdict: str | int) -> None:
    """Writes the verdict, unless another rank has written one already."""
    store.set_first(_VERDICT, json.dumps(verdict))
