"""Killed anywhere, by SIGKILL, and started again with the same command: the same bits in the end.

Two pipelines of two stages, two weighted sources, held-out data. A plan, drawn from a seed, kills a
rank at each of the moments below. After each death the others end by themselves, and `latest`,
where there is one, names a whole checkpoint. What the last start leaves is compared with a run that
nobody disturbed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from monitor.metrics import read_metrics
from tests.dist import run_ranks
from tests.kill_lab import (
    OTHERS,
    SAVE,
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
)  # fmt: skip
from tests.processes import Kill, import_all, imports_torch

SEED = 7
SHORT_JOIN = 8.0  # seconds, where a rank that never comes is waited for
IMPORT_JOIN = 15.0  # the same, where the ranks import torch at different speeds
CLOCK_KILLS, CLOCK_STEPS = 8, 100
END_SECONDS = 15.0  # of the others once all ranks have joined


@dataclass(frozen=True)
class Moment:
    """Where a rank dies; the plan draws which of `ranks` it is."""

    name: str
    target: str
    when: str = "before"
    ranks: Sequence[int] = (*WRITERS, *OTHERS)
    nth: int = 1
    about: str = ""
    wait: float = 0.0

    def drawn(self, draw: random.Random) -> Kill:
        rank = draw.choice(self.ranks)
        return Kill(self.name, rank, self.target, self.when, self.nth, self.about, self.wait)


_ARRIVE = "comm.rendezvous:_Meeting._arrive"
JOINING = (
    Moment("join: the store stands", _ARRIVE, ranks=(0,), wait=1.0),
    Moment("join: store reached", _ARRIVE, ranks=(1, 2, 3)),
    Moment("join: arrived", _ARRIVE, "after", ranks=(1, 2, 3)),
    Moment("join: all there", "comm.watch:Watch._open_hub", ranks=(0,), wait=1.0),
    Moment("join: all there", "comm.watch:Watch._open_link", ranks=(1, 2, 3)),
    Moment("join: linked", "comm.fabric:connect"),
    Moment("join: connected", "training_setup:train"),
)
_TRAIN = "pipeline_parallel.engine:Engine.train"
FIRST = (
    Moment("evaluation before the first step", "pipeline_parallel.engine:Engine.evaluate", nth=2),
    Moment("first step", _TRAIN),
    Moment("first step: the update's second half", _TRAIN, nth=2),
)
ANY_STEP = (
    Moment("resume: before the weights", "training_setup:share_from_first"),
    Moment("resume: metrics cut", "monitor.metrics:MetricsFile.cut_after", "after", ranks=(0,)),
    Moment("step", _TRAIN, nth=3),
    Moment("step: updated", "optimizer.adam:Adam.step", "after"),
    Moment("evaluation", "pipeline_parallel.engine:Engine.evaluate", nth=3),
)
_FILES, _PUBLISH = "checkpoint.step_folder:write_stage_files", "checkpoint.step_folder:publish"
SAVING = (
    Moment("save: no file yet", _FILES, ranks=WRITERS),
    Moment("save: half a file", "torch:save", "half", ranks=WRITERS, nth=2),
    Moment("save: one file", "torch:save", "after", ranks=WRITERS),
    Moment("save: all tensors", _FILES, "after", ranks=WRITERS),
    Moment("save: as a replica", "checkpoint.training_state:CheckpointStore._all_here",
           ranks=OTHERS, nth=2),
)  # fmt: skip
RENAMING = (
    Moment("save: all files", _PUBLISH, ranks=WRITERS),
    Moment("save: renamed by the other", _PUBLISH, ranks=(1,), wait=1.0),
    Moment("save: renamed", _PUBLISH, "after", ranks=WRITERS),
    Moment("save: half of latest", "os:replace", ranks=WRITERS, about=".latest."),
    Moment("save: latest", "os:replace", "after", ranks=WRITERS, about=".latest."),
)
MOMENTS = (*JOINING, *FIRST, *ANY_STEP, *SAVING, *RENAMING)


def draw_plan(seed: int) -> list[Kill]:
    """Every moment once, shuffled: before any checkpoint exists, and then those that need one."""
    draw = random.Random(seed)
    early = [*JOINING, *FIRST, *draw.sample(SAVING, 3)]
    middle = draw.choice(RENAMING[1:])
    late = [moment for moment in MOMENTS if moment not in early and moment is not middle]
    draw.shuffle(early)
    draw.shuffle(late)
    return [moment.drawn(draw) for moment in (*early, middle, *late)]


def import_kill(seed: int) -> Kill:
    """From outside, by what the process has mapped."""
    return Kill("import", random.Random(seed).randrange(WORLD), seen=imports_torch)


def join_timeout(kill: Kill) -> dict[str, float]:
    return {"join-timeout": SHORT_JOIN} if kill.moment.startswith("join: ") else {}


def live(_rank: int, _world: int, _url: str, lab: Lab, seed: int) -> dict[str, list[Start]]:
    """The reference; the plan's starts, and one more to the end; the run without a shared disk."""
    import_all()
    whole = [lab.start("whole")]
    changes = {"join-timeout": IMPORT_JOIN}
    killed = [lab.start_python("killed", import_kill(seed), changes=changes)]
    killed += [lab.start("killed", kill, changes=join_timeout(kill)) for kill in draw_plan(seed)]
    with (lab.disk("killed") / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "lo')
    killed.append(lab.start_python("killed"))
    return {"whole": whole, "killed": killed, "apart": live_apart(lab), **live_on(lab)}


def live_apart(lab: Lab) -> list[Start]:
    """Every rank has a disk of its own; each start is another story, told by its test."""
    disks = [lab.disk("apart", rank) for rank in WRITERS]
    saves_left = (STEPS - SAVE) // SAVE
    one_renamed = Kill("only one stage renamed", 1, _PUBLISH, nth=2, wait=1.0)
    last_latest = Kill("the last latest", 1, "os:replace", about=".latest.", nth=saves_left)
    starts = [lab.start("apart", kill, own_disks=True) for kill in (one_renamed, last_latest, None)]
    cut(disks[1] / str(STEPS) / "prank_1_optimizer.pt")
    starts.append(lab.start("apart", own_disks=True))
    for folder in disks[0].glob("[0-9]*"):
        cut(folder / "prank_0_checkpoint.pt")
    starts.append(lab.start("apart", own_disks=True))
    return starts


def live_on(lab: Lab) -> dict[str, list[Start]]:
    """Starts of the run that is complete."""
    return {
        "again": [lab.start("killed")],
        "afresh": [lab.start("killed", changes={"load-checkpoint": "false"})],
        "other seed": [lab.start("killed", changes={"seed": 43})],
    }


def live_by_the_clock(
    _rank: int, _world: int, _url: str, lab: Lab, seed: int
) -> dict[str, list[Start]]:
    """Started as users do, and killed at any time once drawn steps more are done."""
    draw, metrics = random.Random(seed), lab.disk("clock") / "metrics.jsonl"
    whole, starts = [lab.start_python("clock whole")], []
    for _ in range(CLOCK_KILLS):
        done = 0 if not metrics.exists() else len(read_metrics(metrics))
        seen = partial(is_past, metrics, done + draw.randrange(-4, 12), draw.uniform(0.0, 0.1))
        starts.append(lab.start_python("clock", Kill("clock", draw.randrange(WORLD), seen=seen)))
    starts.append(lab.start_python("clock"))
    return {"whole": whole, "clock": starts}


def is_past(metrics: Path, step: int, rest: float, _pid: int) -> bool:
    """Whether the ranks train and `step` is done, `rest` seconds ago."""
    fresh = metrics.exists() and time.time() - metrics.stat().st_mtime < 1.0
    if not fresh or len(read_metrics(metrics)) < step:
        return False
    time.sleep(rest)
    return True


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def starts(lab: Lab) -> dict[str, list[Start]]:
    (found,) = run_ranks(1, live, lab, SEED, deadline=1800.0)
    return found


@pytest.fixture(scope="module")
def deaths(starts: dict[str, list[Start]]) -> list[Start]:
    return [start for start in (*starts["killed"], *starts["apart"]) if start.kill is not None]


def victim(start: Start) -> int:
    assert start.kill is not None
    return start.kill.rank


def survivors(start: Start) -> list[int]:
    return [rank for rank in range(WORLD) if rank != victim(start)]


def test_the_plan_hits_every_moment(starts: dict[str, list[Start]], deaths: list[Start]) -> None:
    """Each kind of moment also before any checkpoint exists, and every rank at some moment."""
    missed = [start.kill for start in deaths if start.outcome.statuses[victim(start)] != -9]
    assert not missed
    unsaved = [start.kill.moment for start in starts["killed"] if start.kill and not start.latest]
    for family in ("import", "join: ", "first step", "evaluation", "save: "):
        assert any(moment.startswith(family) for moment in unsaved), family
    assert {victim(start) for start in deaths} == set(range(WORLD))


def test_the_others_end_by_themselves_in_time(deaths: list[Start]) -> None:
    """Exit status 1; or 2, where rank 0 died so early that to the others it never was there."""
    for start in deaths:
        assert start.kill is not None
        expected = 2 if start.kill.moment == "import" and victim(start) == 0 else 1
        statuses = [start.outcome.statuses[rank] for rank in survivors(start)]
        assert statuses == [expected] * 3, start
        joining = start.kill.moment.startswith(("import", "join: "))
        assert start.outcome.seconds < END_SECONDS + (IMPORT_JOIN if joining else 0.0), start


def test_the_others_name_the_lost_rank_in_one_line(deaths: list[Start]) -> None:
    for start in deaths:
        for rank in survivors(start):
            (line,) = start.outcome.lines[rank]
            assert f"rank {victim(start)}" in line, start


def test_latest_names_a_whole_checkpoint_after_every_death(deaths: list[Start]) -> None:
    assert [start for start in deaths if start.damage] == []
    assert {start.latest for start in deaths} > {None, str(SAVE)}


def test_the_run_ends_with_the_bits_of_the_undisturbed_one(
    lab: Lab, starts: dict[str, list[Start]]
) -> None:
    """Losses, rates, norms, tokens, held-out losses of each step once; weights and moments."""
    assert starts["whole"][0].outcome.statuses == [0] * WORLD
    assert starts["killed"][-1].outcome.statuses == [0] * WORLD
    whole, killed = lab.disk("whole"), lab.disk("killed")
    assert [line["step"] for line in numbers(killed)] == list(range(1, STEPS + 1))
    assert numbers(killed) == numbers(whole)
    for stage in range(STAGES):
        assert same(state(killed, stage), state(whole, stage))
    assert (killed / "latest").read_text() == str(STEPS)
    assert leftovers(killed) == leftovers(whole) == []


def test_metrics_mark_the_first_step_after_each_resume(
    lab: Lab, starts: dict[str, list[Start]]
) -> None:
    expected: set[int] = set()
    for start in starts["killed"]:
        if start.begin is not None:
            expected = {step for step in expected if step <= start.begin}
            if start.begin and start.steps > start.begin:
                expected.add(start.begin + 1)
    assert len(expected) > 2
    assert marked(lab.disk("killed")) == sorted(expected)
    assert marked(lab.disk("whole")) == []


def test_a_torn_last_line_of_the_metrics_is_mended(lab: Lab) -> None:
    path = lab.disk("killed") / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == len(read_metrics(path)) == STEPS


def test_without_a_shared_disk_stages_that_saved_differently_go_back_together(
    lab: Lab, starts: dict[str, list[Start]]
) -> None:
    """Stage 0 had its folder renamed, stage 1 had not. The replicas' disks stay empty."""
    first, second = starts["apart"][:2]
    assert first.latest == str(SAVE)
    assert second.begin == SAVE
    assert (
        f"step [{2 * SAVE}] is not whole on every stage: going back to {SAVE}"
        in (second.outcome.told[0])
    )
    for rank in OTHERS:
        assert not any(lab.disk("apart", rank).rglob("*"))


def test_latest_of_a_complete_run_catches_up(starts: dict[str, list[Start]]) -> None:
    """Killed between the last folder's rename and its latest, which stayed a save behind."""
    second, third = starts["apart"][1:3]
    assert second.steps == STEPS
    assert third.outcome.statuses == [0] * WORLD
    assert third.outcome.told[0][-1].endswith("are done: nothing to do")
    assert third.latest == str(STEPS)
    assert third.damage == []


def test_a_cut_file_of_one_stage_sends_all_back_to_the_step_before(
    lab: Lab, starts: dict[str, list[Start]]
) -> None:
    """With a warning; and the end is the same again, nothing of the cut folder left."""
    start = starts["apart"][3]
    assert start.begin == STEPS - SAVE
    assert any(f"step [{STEPS}] is not whole" in line for line in start.outcome.told[0])
    assert start.outcome.statuses == [0] * WORLD
    assert numbers(lab.disk("apart", 0)) == numbers(lab.disk("whole"))
    assert same(state(lab.disk("apart", 1), 1), state(lab.disk("whole"), 1))
    assert leftovers(lab.disk("apart", 0)) == leftovers(lab.disk("apart", 1)) == []


def test_no_step_whole_on_all_stages_is_an_error(starts: dict[str, list[Start]]) -> None:
    outcome = starts["apart"][4].outcome
    assert outcome.statuses == [2] * WORLD
    for (line,) in outcome.lines:
        assert "no step is whole on every stage (stage 0 has none; stage 1 has 4, 8" in line


def test_a_complete_run_does_nothing_more(lab: Lab, starts: dict[str, list[Start]]) -> None:
    (start,) = starts["again"]
    assert start.outcome.statuses == [0] * WORLD
    assert start.outcome.told[0][-1] == f"{STEPS} of {STEPS} steps are done: nothing to do"
    assert start.steps == STEPS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("afresh", ("--load-checkpoint false", "has a checkpoint")),
        ("other seed", ("--seed is 43", f"step {STEPS} was made with 42")),
    ],
)
def test_a_mistake_at_resume_ends_every_rank_with_one_line(
    name: str, words: tuple[str, ...], starts: dict[str, list[Start]]
) -> None:
    (start,) = starts[name]
    assert start.outcome.statuses == [2] * WORLD
    for (line,) in start.outcome.lines:
        assert all(word in line for word in words)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_other_plans_end_with_the_same_bits_too(seed: int, tmp_path: Path) -> None:
    lab = make_lab(tmp_path)
    (starts,) = run_ranks(1, live, lab, seed, deadline=1800.0)
    dead = [start for start in starts["killed"] if start.kill is not None]
    test_the_plan_hits_every_moment(starts, dead)
    test_the_others_end_by_themselves_in_time(dead)
    test_the_others_name_the_lost_rank_in_one_line(dead)
    test_latest_names_a_whole_checkpoint_after_every_death(dead)
    test_the_run_ends_with_the_bits_of_the_undisturbed_one(lab, starts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_time_it_ends_with_the_same_bits(seed: int, tmp_path: Path) -> None:
    """Between any two instructions, not at chosen calls."""
    made = make_lab(tmp_path)
    lab = replace(made, flags={**made.flags, "total-steps": CLOCK_STEPS})
    (starts,) = run_ranks(1, live_by_the_clock, lab, seed, deadline=1800.0)
    dead = [start for start in starts["clock"] if start.outcome.statuses != [0] * WORLD]
    assert len(dead) >= CLOCK_KILLS // 2
    test_the_others_end_by_themselves_in_time(dead)
    test_the_others_name_the_lost_rank_in_one_line(dead)
    assert not [start for start in dead if start.damage]
    whole, killed = lab.disk("clock whole"), lab.disk("clock")
    assert numbers(killed) == numbers(whole)
    for stage in range(STAGES):
        assert same(state(killed, stage, CLOCK_STEPS), state(whole, stage, CLOCK_STEPS))
