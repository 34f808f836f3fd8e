"""Tests that runs with random faults end with the bits of a run without faults.

The faults are SIGKILL and SIGSTOP of any rank, cut connections, full disks and SIGTERM. A run has 1
to 3 faults, at moments that tests/support/kill_plan.py names or at random times. After each fault,
all ranks end in time, with the expected statuses and a line with the reason; `latest` always names
a complete checkpoint; the same command resumes the run.
By default, pytest runs only the test that cuts connections. The command for the random faults is
`pytest -s -m faults tests/lifecycle/test_faults.py`. It reads environment variables: FAULT_SEED is
the seed of the faults, or `clock` for a new seed from the time; FAULT_RUNS is the number of runs;
FAULT_LOG is the file that gets the result of each run.
"""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.fault_lab import Lived, live, make_fault_lab, problems, report, tell
from tests.support.fault_plan import ALONE, APART, CUT, Fault, RunPlan, draw_runs
from tests.support.hosts import HOSTS, Host, wired
from tests.support.kill_plan import ANY_STEP
from tests.support.launcher import run_ranks

SHORT = 8  # steps of a run with one fault
# With these seeds, even a few runs have faults of every kind. Most faults are at named moments,
# which a run reaches on every machine.
SEED, RUNS = 1962, 4
SEED_APART, RUNS_APART = 12252, 3


def lead(folder: Path, seed: int, runs: int, hosts: Sequence[Host] = ()) -> None:
    """Draws, starts and checks runs with faults; prints a report, and the seed of these runs."""
    given = os.environ.get("FAULT_SEED", str(seed))
    seed = time.time_ns() % 1_000_000 if given == "clock" else int(given)
    print(f"FAULT_SEED={seed}")
    runs, kinds = int(os.environ.get("FAULT_RUNS", runs)), APART if hosts else ALONE
    lab, log = make_fault_lab(folder, hosts), Path(os.environ.get("FAULT_LOG", folder / "log"))
    plans = draw_runs(seed, runs, kinds)
    (lived,) = run_ranks(1, live, lab, plans, log, deadline=120.0 + 180.0 * runs)
    print(report(lived))
    check(lived, kinds)


def check(lived: Sequence[Lived], kinds: Sequence[str]) -> None:
    wrong = [tell(one) for one in lived if problems(one)]
    assert not wrong, "\n".join(wrong)
    hit = {hit.fault.kind for one in lived for start in one.starts for hit in start.hits}
    assert hit == set(kinds)


@pytest.fixture
def wire() -> Iterator[None]:
    with wired():
        yield


def test_a_run_lives_through_a_cut_connection(tmp_path: Path) -> None:
    """A run resumes after all connections between two ranks were cut in the middle of a step."""
    step = next(moment for moment in ANY_STEP if moment.name == "step")
    fault = Fault(CUT, 3, step, 0.0, peer=2, one=False, to_all=False, rest=None)
    plan = RunPlan(0, {}, [[fault]])
    lab = make_fault_lab(tmp_path, steps=SHORT)
    (lived,) = run_ranks(1, live, lab, [plan], tmp_path / "log", deadline=120.0)
    check(lived, [CUT])


@pytest.mark.faults
def test_drawn_faults(tmp_path: Path) -> None:
    lead(tmp_path, SEED, RUNS)


@pytest.mark.faults
def test_drawn_faults_of_two_hosts_that_share_no_disk(wire: None, tmp_path: Path) -> None:
    """Each host has the ranks of one stage; a fault can also cut the wire between the hosts."""
    lead(tmp_path, SEED_APART, RUNS_APART, HOSTS)
