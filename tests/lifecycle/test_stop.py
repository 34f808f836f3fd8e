"""Tests a stop by a signal: the run completes its update, saves a checkpoint and exits with 75.

The run has two pipelines of two stages, and two iterations per update. Signals stop it many times,
at chosen moments; after each stop, the same command resumes it. When it is complete, it has the
bits of an uninterrupted run. It saves checkpoints only when it is stopped, except in starts for
which PLAN sets --checkpoint-steps.
"""

import json
import re
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from comm.timing import DEFAULT_TIMING, Timing
from tests.support.flags import flags_of
from tests.support.hooks import Kill, no_picture
from tests.support.kill_lab import (
    STAGES,
    STEPS,
    WORLD,
    WRITERS,
    Lab,
    Start,
    leftovers,
    make_lab,
    marked,
    numbers,
    same,
    state,
)
from tests.support.launcher import run_ranks
from tests.support.runs import Outcome, fork_ranks

_ENGINE = "pipeline_parallel.engine:Engine"
_TRAIN, _EVALUATE = f"{_ENGINE}.train", f"{_ENGINE}.evaluate"
TERM = (signal.SIGTERM,)
NOT_BEGUN = "before training began: nothing to save; start the same command again to continue"
AGAIN = "and again (SIGTERM): ended at once"
NOT_DELETED = (
    "and ended during cleanup: the last step is saved; some checkpoints beyond --keep-checkpoints "
    "are not deleted yet, a later save deletes them; start the same command again to continue"
)
LATE = (
    "2 s ago (--grace-seconds): the steps since the last checkpoint are not saved; the same "
    "command resumes from that checkpoint"
)


def saved(step: int) -> str:
    return f"step {step} is saved, but the run is not complete; the same command resumes it"


class Stop(NamedTuple):
    """A start of the run, the signals that ranks get in it, and the expected end of every rank.

    who: the signal and the rank that all error lines name; rest: the text after `who` in the lines;
    latest: the newest step that is saved at the end; changes: flags that only this start has.
    """

    kills: list[Kill]
    who: str
    rest: str
    latest: int | None = None
    changes: str = ""
    status: int = 75
    timing: Timing = DEFAULT_TIMING

    @property
    def line(self) -> str:
        colon = ":" if self.rest.startswith("step") else ""
        return f"asked to stop ({self.who}){colon} {self.rest}"


def ask(rank: int, target: str = _TRAIN, nth: int = 1) -> Kill:
    """Returns a hook that sends SIGTERM to one rank at a call of `target`."""
    return Kill("", rank, target, nth=nth, signals=TERM)


def rest(rank: int, target: str, seconds: float) -> Kill:
    return Kill("a rest", rank, target, signals=(0,), wait=seconds)


FILES, DELETE = "checkpoint.steps.folder:write_stage_files", "checkpoint.retention:delete_step"
REGISTER = "comm.rendezvous.join:_Joining._register"
CTRL_C = Kill("", 0, _TRAIN, signals=(signal.SIGINT, signal.SIGTERM), to_all=True, wait=0.2)
TOO_MANY = "a batch too many"
PLAN = {
    "joining": Stop(
        [Kill("", 2, REGISTER, "after", wait=0.5, signals=TERM)], "SIGTERM on rank 2", NOT_BEGUN
    ),
    "loading": Stop([ask(1, "training.run:train")], "SIGTERM on rank 1", NOT_BEGUN),
    "first evaluation": Stop(
        [ask(0, _EVALUATE), Kill(TOO_MANY, 0, _EVALUATE, nth=2)], "SIGTERM on rank 0", NOT_BEGUN
    ),
    "inside an update": Stop(
        [ask(2, nth=3)], "SIGTERM on rank 2", saved(4), 4, "--profiling tidy_profiling"
    ),
    "Ctrl-C, and a launcher passes it on": Stop([CTRL_C], "SIGINT on rank 0", saved(6), 6),
    "saving": Stop(
        [Kill("", 1, FILES, signals=(signal.SIGUSR1,))],
        "SIGUSR1 on rank 1",
        saved(10),
        10,
        "--checkpoint-steps 4",
    ),
    "evaluation": Stop(  # rank 0 waits until it knows of the signal
        [rest(0, _EVALUATE, 1.0), ask(3, _EVALUATE), Kill(TOO_MANY, 3, _EVALUATE, nth=2)],
        "SIGTERM on rank 3",
        saved(12),
        12,
    ),
    "beside a write": Stop(
        [ask(2, nth=3), rest(1, FILES, 1.0)],
        "SIGTERM on rank 2",
        saved(16),
        16,
        "--async-checkpoint --zero-stage 1 --checkpoint-steps 14 --keep-checkpoints 2",
    ),
    "while old steps go": Stop(
        [ask(2, nth=3), *(rest(rank, DELETE, 6.0) for rank in WRITERS)],
        "SIGTERM on rank 2",
        NOT_DELETED,
        20,
        "--checkpoint-steps 2 --keep-checkpoints 1 --grace-seconds 3",
    ),
    "twice": Stop(
        [Kill("", 3, _TRAIN, signals=(*TERM, *TERM), wait=0.5)],
        "SIGTERM on rank 3",
        AGAIN,
        20,
        status=1,
        timing=Timing(same_stop=0.2),
    ),
    "a rank that hangs": Stop(
        [ask(2), Kill("", 3, _TRAIN, signals=(signal.SIGSTOP,))],
        "SIGTERM on rank 2",
        LATE,
        20,
        "--grace-seconds 2",
        status=1,
    ),
    "last step": Stop([ask(1, nth=STEPS - 20)], "", "", STEPS, status=0),
}
Starts = dict[str, Start]  # by name
LEFT_OUT = {3, 6, 9, 12, 15}  # evaluations that a pending stop omits


class Lived(NamedTuple):
    """Outcomes of PLAN's starts, of a run of one rank, and of rank 1 when rank 0 is not started."""

    starts: Starts
    alone: Outcome
    early: Outcome


def live(_rank: int, _world: int, _url: str, lab: Lab) -> Lived:
    found = {"whole": lab.start("whole")}
    for name, stop in PLAN.items():
        changes = {"checkpoint-steps": 0, **flags_of(stop.changes)}
        found[name] = lab.start("stopped", *stop.kills, changes=changes, timing=stop.timing)
    one = {"world-size": 1, "pipeline-group-size": 1, "data-group-size": 1, "num-layers": 3}
    argvs = lab.argvs("alone", changes={**one, "checkpoint-steps": 0})[:1]
    struck = Kill("", 0, _TRAIN, nth=2, signals=(signal.SIGINT,))
    alone = fork_ranks(argvs, lab.folder, hooks=[struck, no_picture])
    waits = Kill("", 0, "comm.rendezvous.join:_Joining._report", signals=TERM)
    early = fork_ranks(lab.argvs("early")[1:2], lab.folder, hooks=[waits])
    return Lived(found, alone, early)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("stops"))


@pytest.fixture(scope="module")
def lived(lab: Lab) -> Lived:
    (found,) = run_ranks(1, live, lab, deadline=400.0)
    return found


@pytest.fixture(scope="module")
def starts(lived: Lived) -> Starts:
    return lived.starts


@pytest.mark.parametrize("name", PLAN)
def test_all_ranks_end_alike_and_say_so_in_one_line(name: str, starts: Starts) -> None:
    """All ranks end with the same status; each error line names the rank that got the signal."""
    start, stop = starts[name], PLAN[name]
    assert start.outcome.statuses == [stop.status] * WORLD
    if stop.kills[0].to_all:  # rank 0 can receive another rank's request first
        (named,) = re.findall(r"on rank \d", start.outcome.lines[0][0])
        stop = stop._replace(who=stop.who.replace("on rank 0", named))
    for rank, lines in enumerate(start.outcome.lines):
        ends = [f"rank {rank}: {stop.line}"], [f"rank {rank}: rank {stop.who[-1:]}: {stop.line}"]
        assert lines in (ends if stop.status else ([],))


@pytest.mark.parametrize("name", PLAN)
def test_what_is_saved_is_whole_and_from_an_updates_end(name: str, starts: Starts) -> None:
    start, stop = starts[name], PLAN[name]
    assert start.latest == (None if stop.latest is None else str(stop.latest))
    assert start.damage == []
    steps = {stop.latest or 0}
    if stop.rest == AGAIN:  # the step can end before the second request
        steps.add(max(steps) + 1)
    assert start.steps in steps


def test_a_run_that_is_asked_in_its_last_step_is_complete(starts: Starts) -> None:
    assert starts["last step"].outcome.statuses == [0] * WORLD
    assert starts["last step"].steps == STEPS


def test_the_run_ends_with_the_bits_of_the_undisturbed_one(lab: Lab, starts: Starts) -> None:
    """The stopped run has the bits of the uninterrupted run, but lacks some evaluations."""
    whole, stopped = lab.disk("whole"), lab.disk("stopped")
    assert starts["whole"].outcome.statuses == [0] * WORLD
    expected = numbers(whole)
    for line in expected:
        if line["step"] in LEFT_OUT:
            del line["eval_loss"], line["eval_perplexity"]
    assert numbers(stopped) == expected
    for stage in range(STAGES):
        assert same(state(stopped, stage), state(whole, stage))
    assert marked(stopped) == [5, 7, 11, 13, 17, 21]
    saves = {folder.name for folder in stopped.iterdir() if folder.is_dir()}
    # Steps before 14 are deleted; later stops left no time for a deletion.
    assert saves == {"14", "16", "18", "20", str(STEPS)}
    assert leftovers(stopped) == []


@pytest.mark.parametrize("rank", range(WORLD))
def test_the_traces_are_written(lab: Lab, starts: Starts, rank: int) -> None:
    events = json.loads(
        (lab.folder / "stopped" / "trace_json" / f"disk_rank{rank}.json").read_text()
    )
    assert {event["args"]["step"] for event in events} == {1, 2, 3, 4}


def test_a_rank_that_finds_no_rank_0_stops_alone(lived: Lived) -> None:
    assert lived.early.statuses == [75]
    assert lived.early.lines == [[f"rank 1: asked to stop (SIGTERM on rank 1) {NOT_BEGUN}"]]


def test_a_world_of_one_stops_too(lab: Lab, lived: Lived) -> None:
    """A run of one rank also exits with 75, but its error line does not begin with the rank."""
    assert lived.alone.statuses == [75]
    assert lived.alone.lines == [[f"asked to stop (SIGINT on rank 0): {saved(2)}"]]
    assert Path(lab.disk("alone"), "latest").read_text() == "2"
