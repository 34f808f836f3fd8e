"""dist_clm_train.py as processes whose exit status and output a test looks at.

Every rank of every run is a fork of one process that has imported all (tests.support.preloaded),
and does what `python dist_clm_train.py` would.
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.dist import run_ranks
from tests.support.forked import output, redirect, status_of
from tests.support.hosts import enter_host


@dataclass(frozen=True)
class Rank:
    """One process: its flags, the variables set for it, its working directory, its host.

    `host` is a network namespace that `ip netns` made, whose name is its host name too. `late` are
    seconds that it starts after the others.
    """

    argv: Sequence[str]
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    host: str | None = None
    late: float = 0.0


@dataclass(frozen=True)
class Run:
    """The processes of a run; `kill` is a rank that gets SIGKILL once a file is there."""

    name: str
    ranks: Sequence[Rank]
    kill: tuple[int, Path] | None = None
    seconds: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended; `status` is None where it had to be ended, negative for a signal."""

    status: int | None
    stderr: str
    stdout: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.stderr.splitlines()


def run_all(
    chains: Sequence[Sequence[Run]], *, at_once: int, deadline: float
) -> dict[str, list[Outcome]]:
    """The outcomes of all runs by name: `at_once` chains at once, the runs of each one by one."""
    (outcomes,) = run_ranks(1, _serve, chains, at_once, deadline=deadline)
    return outcomes


def _serve(
    _rank: int, _world_size: int, _url: str, chains: Sequence[Sequence[Run]], at_once: int
) -> dict[str, list[Outcome]]:
    ended: dict[str, list[Outcome]] = {}
    waiting = [_run_chain(chain, ended) for chain in chains]
    running: list[Iterator[None]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
        running = [chain for chain in running if next(chain, "over") is None]
        time.sleep(0.01)
    return ended


def _run_chain(runs: Sequence[Run], ended: dict[str, list[Outcome]]) -> Iterator[None]:
    for run in runs:
        places = [rank.folder / f"{run.name}.rank{i}" for i, rank in enumerate(run.ranks)]
        ends: dict[int, tuple[int | None, float]] = {}
        yield from _await(run, places, ends)
        ended[run.name] = [_outcome(place, *ends[i]) for i, place in enumerate(places)]


def _await(
    run: Run, places: Sequence[Path], ends: dict[int, tuple[int | None, float]]
) -> Iterator[None]:
    """Yields while processes of the run are there; `ends` gets each one's status and seconds."""
    began, kill = time.monotonic(), run.kill
    pids = [_fork(rank, place) for rank, place in zip(run.ranks, places, strict=True)]
    while len(ends) < len(pids):
        yield
        over = time.monotonic() > began + run.seconds
        for i in set(range(len(pids))) - ends.keys():
            if over:
                os.kill(pids[i], signal.SIGKILL)
            pid, status = os.waitpid(pids[i], 0 if over else os.WNOHANG)
            if pid:
                code = None if over else os.waitstatus_to_exitcode(status)
                ends[i] = (code, time.monotonic() - began)
        if kill is not None and kill[0] not in ends and kill[1].exists():
            os.kill(pids[kill[0]], signal.SIGKILL)
            kill = None


def _outcome(place: Path, status: int | None, seconds: float) -> Outcome:
    stderr, stdout = (output(place, end).read_text() for end in (".err", ".out"))
    return Outcome(status, stderr, stdout, seconds)


def _fork(rank: Rank, place: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        redirect(place)
        if rank.host is not None:
            enter_host(rank.host)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.pop(variable, None)
        os.environ.update(rank.environ)
        os.chdir(rank.folder)
        time.sleep(rank.late)
        status = status_of(lambda: importlib.import_module("dist_clm_train").main(rank.argv))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    finally:
        os._exit(1)
