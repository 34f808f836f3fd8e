"""Tests that, if a rank dies, fails or hangs, the others end soon and name it in an error line."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from comm.liveness.failure_policy import ExitPolicy
from comm.rendezvous.join import Rendezvous
from comm.timing import DEFAULT_TIMING, Timing
from comm.topology import Topology
from tests.support.connected import Rank, RankProgram, member
from tests.support.launcher import Process, await_ready, fork, free_port, start

QUICK = Timing(check=1.5, linger=1.0)


def work_for_ever(rank: Rank) -> None:
    while True:
        rank.groups.control.all_reduce(torch.ones(4)).wait()
        time.sleep(0.005)


def wait_for(victim: int, rank: Rank) -> None:
    """Enters an all-reduce on every rank except `victim`, which never joins."""
    while rank.topology.rank == victim:
        time.sleep(1.0)
    rank.groups.control.all_reduce(torch.ones(4)).wait()


def fail_as_rank_two(rank: Rank) -> None:
    if rank.topology.rank == 2:
        rank.policy.fail(2, "--x 3: must be less\nthan 3")
    work_for_ever(rank)


def close_slowly(rank: Rank) -> None:
    if rank.topology.rank == 0:
        rank.policy.fail(2, "--x 3: must be less", before_exit=lambda: time.sleep(6.0))
    work_for_ever(rank)


def part_at_once(rank: Rank) -> None:
    """Returns first on rank 0, which must then wait until the other ranks end."""
    time.sleep(0.2 * rank.topology.rank)


class Run:
    """Four ranks that run one program."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ranks: list[Process] = []

    def start(
        self, program: RankProgram, *, dist_timeout: float = 60.0, timing: Timing = DEFAULT_TIMING
    ) -> None:
        url = f"tcp://127.0.0.1:{free_port()}"
        self.ranks = [
            start(self._folder, str(rank), member, rank, url, (2, 2), program, dist_timeout, timing)
            for rank in range(4)
        ]

    def await_ready(self, *, but_for: int) -> None:
        await_ready([rank for number, rank in enumerate(self.ranks) if number != but_for])

    def survivors(self, victim: int, *, within: float) -> Iterator[tuple[int, str]]:
        """Checks that ranks except `victim` end with status 1; yields their numbers and errors."""
        for number, rank in enumerate(self.ranks):
            if number != victim:
                assert rank.status(within=within) == 1
                (line,) = rank.lines
                yield number, line

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.kill()


@pytest.mark.parametrize("victim", [3, 0])
def test_a_killed_rank_is_named_at_once(run: Run, victim: int) -> None:
    run.start(partial(wait_for, victim))
    run.await_ready(but_for=victim)
    os.kill(run.ranks[victim].pid, signal.SIGKILL)
    for number, line in run.survivors(victim, within=8.0):
        assert line.startswith(f"rank {number}: rank {victim} (stage {victim % 2}, replica ")
        assert "is gone: " in line
        assert "this rank was in: control all-reduce, " in line
        assert line.endswith("Start all ranks again to resume from the latest checkpoint.")


def test_a_mistake_that_one_rank_sees_ends_all_with_status_2(run: Run) -> None:
    run.start(fail_as_rank_two)
    for number, rank in enumerate(run.ranks):
        assert rank.status(within=30.0) == 2
        prefix = "" if number == 2 else f"rank {number}: "
        assert rank.lines == [f"{prefix}rank 2: --x 3: must be less than 3"]


def test_what_takes_long_comes_after_all_have_heard(run: Run) -> None:
    run.start(close_slowly, dist_timeout=1.0, timing=QUICK)
    for number in (1, 2, 3, 0):
        assert run.ranks[number].status(within=30.0) == 2
        prefix = f"rank {number}: " if number else ""
        assert run.ranks[number].lines == [f"{prefix}rank 0: --x 3: must be less"]


@pytest.mark.parametrize("victim", [3, 0])
def test_a_hung_rank_is_reported_before_anybody_gives_up(run: Run, victim: int) -> None:
    """Rank 0 reports the hung rank; if rank 0 hangs, all other ranks report it."""
    run.start(work_for_ever, timing=Timing(heartbeat_interval=0.2, unresponsive=2.0))
    run.await_ready(but_for=victim)
    tellers = [0] if victim else [1, 2, 3]
    told = {signal.SIGSTOP: " has not responded for 2 s (", signal.SIGCONT: " responds again"}
    for sent, words in told.items():
        os.kill(run.ranks[victim].pid, sent)
        for teller in tellers:
            await_line(run.ranks[teller], f"rank {victim} (stage {victim % 2}, replica ", words)
    for number, rank in enumerate(run.ranks):
        assert rank.status() is None
        assert len(rank.lines) == (2 if number in tellers else 0)


def await_line(process: Process, start: str, words: str) -> None:
    deadline = time.monotonic() + 20.0
    while not any(line.startswith(start) and words in line for line in process.lines):
        assert time.monotonic() < deadline, process.lines
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [3, 0])
def test_a_hung_rank_is_named_after_the_timeout(run: Run, victim: int) -> None:
    run.start(work_for_ever, dist_timeout=2.0, timing=QUICK)
    run.await_ready(but_for=victim)
    os.kill(run.ranks[victim].pid, signal.SIGSTOP)
    for _, line in run.survivors(victim, within=20.0):
        assert f"rank {victim} (stage {victim % 2}, replica " in line
        assert "it does not answer" in line


def test_an_orderly_end(run: Run) -> None:
    run.start(part_at_once)
    for rank in run.ranks:
        assert rank.status(within=30.0) == 0
        assert rank.lines == []


def fail_alone() -> None:
    policy = ExitPolicy.connect(Rendezvous.alone(), Topology(0, 1, 1))
    policy.operation_failed(RuntimeError("no peer was lost"))


def test_a_world_of_one_just_ends(tmp_path: Path) -> None:
    process = fork(tmp_path / "alone", fail_alone)
    assert process.status(within=20.0) == 1
    assert process.stderr.startswith("no peer was lost ")
