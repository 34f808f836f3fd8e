"""Tests that a run killed at any moment resumes and ends with the bits of an uninterrupted run.

The run has two pipelines of two stages, two weighted sources and held-out data. It is started many
times; SIGKILL ends one rank in each start except the last. A plan, drawn from a seed, sets the rank
and the moment of each kill; it has kills from each group of moments in tests/support/kill_plan.py.
After each kill the other ranks end by themselves, and `latest`, if it exists, names a complete
checkpoint.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from monitor.metrics import read_metrics
from tests.support.hooks import Kill
from tests.support.kill_lab import (
    OTHERS,
    SAVE,
    STAGES,
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
from tests.support.kill_plan import PUBLISH, draw_plan, draw_short_plan
from tests.support.launcher import run_ranks

Starts = dict[str, list[Start]]  # by run
SEED, STEPS = 10, 12
LONG = 24  # steps of the run of the slow test
SHORT_JOIN = 5.0  # seconds; for starts that wait for a rank in vain
END_SECONDS = 15.0  # limit for the other ranks after all have joined; before, twice as long


def waits(kill: Kill) -> bool:
    """Returns whether `kill` makes another rank wait for the killed rank until --join-timeout."""
    joining = ("comm.rendezvous.join", "comm.liveness.failure_detector")
    return kill.moment == "import" or (kill.rank != 0 and kill.target.startswith(joining))


def live(rank: int, _world: int, _url: str, lab: Lab, plan: Sequence[Kill]) -> Starts:
    """Starts this process's share of the runs; returns the starts of each run by the run's name.

    Process 0 starts an uninterrupted run, a run without a shared disk, and a run with the kills of
    `plan` for which `waits` is false. Process 1 starts a run with the other kills of `plan`.
    """
    if rank == 1:
        changes = {"join-timeout": SHORT_JOIN}
        waiting = [lab.start("waiting", kill, changes=changes) for kill in plan if waits(kill)]
        return {"waiting": waiting}
    whole = [lab.start("whole")]
    killed = [lab.start("killed", kill) for kill in plan if not waits(kill)]
    with (lab.disk("killed") / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "lo')
    killed.append(lab.start("killed"))
    apart = live_apart(lab)
    return {"whole": whole, "killed": killed, "apart": apart, "again": [lab.start("killed")]}


def live_apart(lab: Lab) -> list[Start]:
    """Starts one run seven times; each rank has a disk of its own.

    A kill ends each of the first two starts; saved files are changed before each of the last four.
    """
    disks = [lab.disk("apart", rank) for rank in WRITERS]
    saves_left = (lab.steps - SAVE) // SAVE
    one_renamed = Kill("only one stage renamed", 1, PUBLISH, nth=2, wait=1.0)
    last_latest = Kill("the last latest", 1, "os:replace", about=".latest.", nth=saves_left)
    starts = [lab.start("apart", kill, own_disks=True) for kill in (one_renamed, last_latest, None)]
    cut(disks[1] / str(lab.steps) / "prank_1_optimizer.pt")
    starts.append(lab.start("apart", own_disks=True))
    shutil.rmtree(disks[1] / str(lab.steps))  # as the error line advises
    starts.append(lab.start("apart", own_disks=True))
    shutil.rmtree(disks[1] / str(lab.steps))
    shutil.copytree(lab.disk("killed") / str(lab.steps), disks[1] / str(lab.steps))
    starts.append(lab.start("apart", own_disks=True))
    for folder in disks[0].glob("[0-9]*"):
        cut(folder / "prank_0_checkpoint.pt")
    starts.append(lab.start("apart", own_disks=True))
    return starts


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("kills"), STEPS)


@pytest.fixture(scope="module")
def starts(lab: Lab) -> Starts:
    return live_twice(lab, draw_short_plan(SEED))


def live_twice(lab: Lab, plan: Sequence[Kill]) -> Starts:
    found, waiting = run_ranks(2, live, lab, plan, deadline=1800.0)
    return found | waiting


@pytest.fixture(scope="module")
def deaths(starts: Starts) -> list[Start]:
    return deaths_of(starts)


def deaths_of(starts: Starts) -> list[Start]:
    found = (*starts["killed"], *starts["waiting"], *starts["apart"])
    return [start for start in found if start.kill is not None]


def victim(start: Start) -> int:
    assert start.kill is not None
    return start.kill.rank


def survivors(start: Start) -> list[int]:
    return [rank for rank in range(WORLD) if rank != victim(start)]


def test_the_plan_hits_every_moment(starts: Starts, deaths: list[Start]) -> None:
    """Each planned kill happens, and every rank is killed at least once.

    At least one kill of each kind (import, join, first step, evaluation, save) happens before the
    first checkpoint is complete.
    """
    missed = [start.kill for start in deaths if start.outcome.statuses[victim(start)] != -9]
    assert not missed
    found = [*starts["killed"], *starts["waiting"]]
    unsaved = [start.kill.moment for start in found if start.kill and not start.latest]
    for family in ("import", "join: ", "first step", "evaluation", "save: "):
        assert any(moment.startswith(family) for moment in unsaved), family
    assert {victim(start) for start in deaths} == set(range(WORLD))


def test_the_others_end_by_themselves_in_time(deaths: list[Start]) -> None:
    """The other ranks exit with 1, or with 2 if rank 0 died before they could connect to it."""
    for start in deaths:
        assert start.kill is not None
        expected = 2 if start.kill.moment == "import" and victim(start) == 0 else 1
        statuses = [start.outcome.statuses[rank] for rank in survivors(start)]
        assert statuses == [expected] * 3, start
        joining = start.kill.moment.startswith(("import", "join: "))
        assert start.outcome.seconds < END_SECONDS * (2 if joining else 1), start


def test_the_others_name_the_lost_rank_in_one_line(deaths: list[Start]) -> None:
    for start in deaths:
        for rank in survivors(start):
            (line,) = start.outcome.lines[rank]
            assert f"rank {victim(start)}" in line, start


def test_latest_names_a_whole_checkpoint_after_every_death(deaths: list[Start]) -> None:
    assert [start for start in deaths if start.damage] == []
    assert {start.latest for start in deaths} > {None, str(SAVE)}


def test_the_run_ends_with_the_bits_of_the_undisturbed_one(lab: Lab, starts: Starts) -> None:
    """The killed run has the metrics, weights and optimizer state of the uninterrupted run."""
    assert starts["whole"][0].outcome.statuses == [0] * WORLD
    assert starts["killed"][-1].outcome.statuses == [0] * WORLD
    whole, killed = lab.disk("whole"), lab.disk("killed")
    assert [line["step"] for line in numbers(killed)] == list(range(1, lab.steps + 1))
    assert numbers(killed) == numbers(whole)
    for stage in range(STAGES):
        assert same(state(killed, stage, lab.steps), state(whole, stage, lab.steps))
    assert (killed / "latest").read_text() == str(lab.steps)
    assert leftovers(killed) == leftovers(whole) == []


def test_metrics_mark_the_first_step_after_each_resume(lab: Lab, starts: Starts) -> None:
    expected: set[int] = set()
    for start in starts["killed"]:
        if start.begin is not None:
            expected = {step for step in expected if step <= start.begin}
            if start.begin and start.steps > start.begin:
                expected.add(start.begin + 1)
    assert len(expected) >= 2
    assert marked(lab.disk("killed")) == sorted(expected)
    assert marked(lab.disk("whole")) == []


def test_a_torn_last_line_of_the_metrics_is_mended(lab: Lab) -> None:
    path = lab.disk("killed") / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == len(read_metrics(path)) == STEPS


def test_without_a_shared_disk_stages_that_saved_differently_go_back_together(
    lab: Lab, starts: Starts
) -> None:
    """If only one stage has the newest checkpoint, both stages resume from an older one.

    The ranks of replica 1 save no files.
    """
    first, second = starts["apart"][:2]
    assert first.latest == str(SAVE)
    assert second.begin == SAVE
    assert (
        f"step {2 * SAVE} is not complete on every stage, or has files of different saves: going "
        f"back to step {SAVE}"
    ) in second.outcome.told[0]
    for rank in OTHERS:
        assert not any(lab.disk("apart", rank).rglob("*"))


def test_latest_of_a_complete_run_catches_up(starts: Starts) -> None:
    """If a rank saves the last step but dies before it writes `latest`, a restart writes it."""
    second, third = starts["apart"][1:3]
    assert second.steps == STEPS
    assert third.outcome.statuses == [0] * WORLD
    assert third.outcome.told[0][-1].endswith("are done: nothing to do")
    assert third.latest == str(STEPS)
    assert third.damage == []


def test_a_cut_file_of_one_stage_is_an_error_that_offers_the_step_before(starts: Starts) -> None:
    outcome = starts["apart"][3].outcome
    assert outcome.statuses == [2] * WORLD
    for (line,) in outcome.lines:
        assert f"disk1/{STEPS}/prank_1_optimizer.pt: damaged" in line
        assert f"complete checkpoint before it is step {STEPS - SAVE}" in line


def test_once_it_is_moved_away_all_go_back_to_the_step_before(lab: Lab, starts: Starts) -> None:
    """After the folder with the damaged file is deleted, the run resumes from an older step.

    It ends with the bits of the uninterrupted run.
    """
    assert_went_back(starts["apart"][4])
    assert numbers(lab.disk("apart", 0)) == numbers(lab.disk("whole"))
    assert same(state(lab.disk("apart", 1), 1, STEPS), state(lab.disk("whole"), 1, STEPS))
    assert leftovers(lab.disk("apart", 0)) == leftovers(lab.disk("apart", 1)) == []


def test_a_step_of_another_run_on_one_stage_is_not_mixed_in(starts: Starts) -> None:
    """If a stage's files of a step come from another run, all ranks resume from an older step."""
    assert_went_back(starts["apart"][5])


def assert_went_back(start: Start) -> None:
    assert start.begin == STEPS - SAVE
    assert any(f"step {STEPS} is not complete" in line for line in start.outcome.told[0])
    assert start.outcome.statuses == [0] * WORLD


def test_no_whole_step_is_an_error(starts: Starts) -> None:
    outcome = starts["apart"][6].outcome
    assert outcome.statuses == [2] * WORLD
    for (line,) in outcome.lines:
        assert f"disk0/{STEPS}/prank_0_checkpoint.pt: damaged" in line
        assert line.endswith("there is no complete checkpoint before this step")


def test_a_complete_run_does_nothing_more(lab: Lab, starts: Starts) -> None:
    (start,) = starts["again"]
    assert start.outcome.statuses == [0] * WORLD
    assert start.outcome.told[0][-1] == f"{STEPS} of {STEPS} steps are done: nothing to do"
    assert start.steps == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_other_plans_end_with_the_same_bits_too(seed: int, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, LONG)
    starts = live_twice(lab, draw_plan(seed))
    dead = deaths_of(starts)
    test_the_plan_hits_every_moment(starts, dead)
    test_the_others_end_by_themselves_in_time(dead)
    test_the_others_name_the_lost_rank_in_one_line(dead)
    test_latest_names_a_whole_checkpoint_after_every_death(dead)
    test_the_run_ends_with_the_bits_of_the_undisturbed_one(lab, starts)
