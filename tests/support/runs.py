"""Runs of dist_clm_train.py that tests start and wait for; ranks can be on simulated hosts."""

import contextlib
import importlib
import os
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from comm.timing import DEFAULT_TIMING, Timing
from tests.support.hosts import enter_host
from tests.support.launcher import Process, fork, is_fork, spawn

# Called repeatedly with the process ids of a run, and the exit statuses of ended ranks.
Attendant = Callable[[Sequence[int], Mapping[int, int | None]], None]

SCRIPT = Path(__file__).parents[2] / "dist_clm_train.py"
_TICK_SECONDS = 0.01
_OF_A_USER = ("GLOO_", "LOCAL_RANK", "MASTER_", "NCCL_", "RANK", "WANDB_", "WORLD_SIZE")


class Hook(Protocol):
    """A change to one rank's process before the rank runs."""

    @property
    def rank(self) -> int:
        """Rank whose process is changed."""

    def arm(self) -> None:
        """Changes the process; the process itself calls this once."""


@dataclass(frozen=True)
class Rank:
    """One process of a run.

    argv: the flags of dist_clm_train.py.
    folder: the working directory, which also gets the output.
    environ: additional environment variables.
    host: a network namespace made by `ip netns`; also the host name.
    late: seconds until the process starts.
    hooks: changes to the process.
    timing: timeouts and intervals of the ranks.
    is_forked: False to start a new Python process, as a user does; the flags, the working directory
        and `environ` apply to it, the other fields do not.
    """

    argv: Sequence[str]
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    host: str | None = None
    late: float = 0.0
    hooks: Sequence[Hook] = ()
    timing: Timing = DEFAULT_TIMING
    is_forked: bool = True


@dataclass(frozen=True)
class Run:
    """The processes of a run; `attend` is called until the last process has ended."""

    name: str
    ranks: Sequence[Rank]
    attend: Attendant | None = None
    seconds: float = 120.0


@dataclass(frozen=True)
class Ended:
    """End of a process; `status` is negative if a signal killed it, None if the deadline passed.

    seconds: time from the start of the run to the end of the process.
    """

    status: int | None
    stderr: str
    stdout: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.stderr.splitlines()


class Outcome(tuple[Ended, ...]):
    """Results of all processes of a run, in the order of ranks."""

    @property
    def statuses(self) -> list[int | None]:
        return [ended.status for ended in self]

    @property
    def lines(self) -> list[list[str]]:
        """Lines of each rank on stderr."""
        return [ended.lines for ended in self]

    @property
    def told(self) -> list[list[str]]:
        """Lines of each rank on stdout."""
        return [ended.stdout.splitlines() for ended in self]

    @property
    def seconds(self) -> float:
        """Seconds from the end of the first process to the end of the last process."""
        ends = [ended.seconds for ended in self]
        return max(ends) - min(ends)


def let_go(pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
    """Sends SIGCONT to a stopped rank after all other ranks have ended."""
    left = set(range(len(pids))) - ended.keys()
    if len(left) == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[left.pop()], signal.SIGCONT)


def fork_ranks(
    argvs: Sequence[Sequence[str]],
    folder: Path,
    *,
    hooks: Sequence[Hook] = (),
    seconds: float = 90.0,
    attend: Attendant | None = let_go,
    hosts: Sequence[str] | None = None,
    timing: Timing = DEFAULT_TIMING,
) -> Outcome:
    """Runs all ranks of dist_clm_train.py until they end; `hooks` or `attend` can end them."""
    ranks = [
        Rank(
            argv,
            folder,
            host=None if hosts is None else hosts[rank],
            hooks=[hook for hook in hooks if hook.rank == rank],
            timing=timing,
        )
        for rank, argv in enumerate(argvs)
    ]
    return run(Run("run", ranks, attend, seconds))


def run(one: Run) -> Outcome:
    """Runs all processes of one run to their end, and returns the outcome."""
    return run_all([[one]], at_once=1)[one.name]


def run_all(chains: Sequence[Sequence[Run]], *, at_once: int) -> dict[str, Outcome]:
    """Executes chains of runs, at most `at_once` chains at a time; returns outcomes by run name."""
    outcomes: dict[str, Outcome] = {}
    waiting = [_run_chain(chain, outcomes) for chain in chains]
    running: list[Generator[None]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
            running = [chain for chain in running if next(chain, "over") is None]
            time.sleep(_TICK_SECONDS)
    finally:
        for chain in running:
            chain.close()
    return outcomes


def _run_chain(runs: Sequence[Run], outcomes: dict[str, Outcome]) -> Generator[None]:
    for one in runs:
        outcomes[one.name] = yield from _run(one)


def _run(one: Run) -> Generator[None, None, Outcome]:
    """Starts a run, then yields until all its processes have ended; kills them at the deadline."""
    began = time.monotonic()
    processes: list[Process] = []
    ends: dict[int, tuple[int | None, float]] = {}
    try:
        for number, rank in enumerate(one.ranks):
            processes.append(_start_rank(rank, rank.folder / f"{one.name}.rank{number}"))
            if is_fork():  # process group for a signal to all ranks
                os.setpgid(processes[number].pid, processes[0].pid)
        pids = [process.pid for process in processes]
        while len(ends) < len(pids) and time.monotonic() < began + one.seconds:
            yield
            if one.attend is not None:
                one.attend(pids, {rank: status for rank, (status, _) in ends.items()})
            for number in set(range(len(pids))) - ends.keys():
                if (status := processes[number].status()) is not None:
                    ends[number] = (status, time.monotonic() - began)
    finally:
        for process in processes:
            process.kill()
    late = (None, time.monotonic() - began)
    pairs = [(process, *ends.get(number, late)) for number, process in enumerate(processes)]
    return Outcome(Ended(status, p.stderr, p.stdout, seconds) for p, status, seconds in pairs)


def _start_rank(rank: Rank, place: Path) -> Process:
    if rank.is_forked:
        return fork(place, _be_rank, rank)
    return spawn(place, SCRIPT, rank.argv, {**_environ(), **rank.environ})


def _be_rank(rank: Rank) -> None:
    environ = {**_environ(), **rank.environ}
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(rank.folder)
    if rank.host is not None:
        enter_host(rank.host)
    time.sleep(rank.late)
    for hook in rank.hooks:
        hook.arm()
    importlib.import_module("dist_clm_train").main(rank.argv, rank.timing)


def _environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_USER)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
