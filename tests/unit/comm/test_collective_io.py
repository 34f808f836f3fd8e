"""Tests run_on_all: slow file operations do not time out, and all ranks learn of a failure."""

import logging
import threading
import time
from typing import Any

import pytest

from comm.backends.single_process import SingleProcessCommunicator
from comm.collective_io import run_on_all
from comm.topology import Topology
from tests.support.cases import connected
from tests.support.launcher import run_ranks


def fail() -> None:
    raise OSError(28, "No space left on device", "/disk/file")


def succeed() -> None:
    """Does nothing."""


def work_on_all(rank: int, world: int, url: str) -> list[str | None]:
    """Runs slow work on rank 1, then failing work on the last rank; returns the two results."""
    with connected(Topology(rank, world, 1), url, dist_timeout=3.0) as (groups, _):
        slow = (lambda: time.sleep(7.0)) if rank == 1 else None
        found = [run_on_all(groups.control, slow, "slow work")]
        work = fail if rank == world - 1 else succeed
        found.append(run_on_all(groups.control, work, "failing work"))
        return found


def test_a_slow_disk_ends_no_run_and_all_hear_of_a_failure() -> None:
    found = run_ranks(3, work_on_all)
    assert [slow for slow, _ in found] == [None] * 3
    (failure,) = {failure for _, failure in found}
    assert failure is not None
    assert failure.startswith("rank 2 on ")
    assert failure.endswith(": [Errno 28] No space left on device: '/disk/file'")


def test_a_mistake_of_ours_is_no_failure_of_the_disk() -> None:
    def wrong() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_on_all(SingleProcessCommunicator(), wrong, "work")


def test_slow_work_is_told_while_it_goes_on() -> None:
    """A log line reports slow work before the work ends."""
    told = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("saving step 7: slow: rank 0 not done after"):
                told.set()

    def wait() -> None:
        assert told.wait(30.0)

    logger: Any = logging.getLogger("comm.collective_io")
    listener = Listener()
    logger.addHandler(listener)
    try:
        control = SingleProcessCommunicator()
        assert (
            run_on_all(control, wait, "saving step 7", exchange_seconds=0.01, slow_seconds=0.05)
            is None
        )
    finally:
        logger.removeHandler(listener)
