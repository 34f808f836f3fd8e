"""Tests that --keep-checkpoints counts only checkpoints that are complete on every stage.

Two stages, each with its own disk, save checkpoints at steps 2, 5 and 8. Then each case changes
files on the disks. The next start of the program saves step 10, keeps the two newest complete
checkpoints, and deletes incomplete checkpoints and older ones.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.retention import RetentionPolicy
from checkpoint.steps.complete import StageFiles, complete_steps
from checkpoint.store import CheckpointStore
from comm.objects import gather_json
from comm.process_groups import ProcessGroups
from comm.topology import Topology
from tests.support.cases import connected
from tests.support.checkpoint_models import cut, step_meta
from tests.support.launcher import run_ranks

STAGES, OLD, NEW = 2, (2, 5, 8), 10
Found = dict[str, tuple[list[str], list[str]]]


def nothing(_disk: Path) -> None:
    """Changes nothing, so that all checkpoints are complete."""


def remove(disk: Path) -> None:
    """Removes stage 1's step 8, as if the program crashed when only stage 0 had saved it."""
    shutil.rmtree(disk / "8")


def call_by_another_number(disk: Path) -> None:
    """Replaces folder 8 by a copy of folder 5, on the disks of both stages."""
    for one in (disk, disk.with_name("disk0")):
        shutil.rmtree(one / "8")
        shutil.copytree(one / "5", one / "8")


def bring(disk: Path) -> None:
    """Moves stage 1's files of step 8 to stage 0's disk, as a user does before a conversion."""
    for path in (disk / "8").glob("prank_1_*"):
        shutil.copy(path, disk.with_name("disk0") / "8")
    shutil.rmtree(disk / "8")


def refuse(disk: Path) -> None:
    """Replaces stage 1's manifest of step 8 by a folder, so that reading the manifest fails."""
    (disk / "8" / "prank_1_manifest.json").unlink()
    (disk / "8" / "prank_1_manifest.json").mkdir()


def take_a_number(disk: Path) -> None:
    """Adds an empty folder 7, and a copy of step 8 as step 12, which is above the new step 10."""
    (disk / "7").mkdir()
    shutil.copytree(disk / "8", disk / "12")


# The change of the disks, the steps that are on stage 0's disk at the end, and the steps on stage
# 1's disk if they differ.
STORIES: dict[str, tuple[Callable[[Path], None], list[str], list[str] | None]] = {
    "nothing": (nothing, ["8", "10"], None),
    "gone": (remove, ["5", "10"], None),
    "cut weights": (lambda disk: cut(disk / "8" / "prank_1_checkpoint.pt"), ["5", "10"], None),
    "cut manifest": (lambda disk: cut(disk / "8" / "prank_1_manifest.json"), ["5", "10"], None),
    "another number": (call_by_another_number, ["5", "10"], None),
    "on the wrong disk": (bring, ["5", "10"], None),
    "not readable": (refuse, ["2", "5", "8", "10"], None),
    "others' numbers": (take_a_number, ["8", "10"], ["7", "8", "10", "12"]),
}


def steps_of(disk: Path) -> list[str]:
    return sorted((path.name for path in disk.glob("[0-9]*")), key=int)


def states_of(disk: Path) -> list[str]:
    return sorted((path.parent.name for path in disk.glob("*/*_optimizer.pt")), key=int)


def save(
    groups: ProcessGroups, disk: Path, nonce: str, steps: tuple[int, ...], keep: RetentionPolicy
) -> None:
    """Saves a checkpoint at each of `steps`, as one start of the program does."""
    topology = Topology(groups.control.rank, STAGES, 1)
    places: dict[str, Any] = {"control": groups.control, "topology": topology, "nonce": nonce}
    store = CheckpointStore(disk, **places, extras={"config.json": b"{}"}, policy=keep)
    parts: dict[str, object] = {"checkpoint": {}, "optimizer": {}, "scheduler": {}}
    for step in steps:
        store.begin(step_meta(step, [1] * STAGES), parts=parts)
        store.finish()
        store.start_cleanup()
    store.finish_cleanup()


def live(rank: int, _world: int, url: str, folder: Path) -> Found:
    """Runs every case; returns the steps and optimizer states that stay on this rank's disk."""
    found = {}
    logging.getLogger().setLevel(logging.ERROR)
    with connected(Topology(rank, STAGES, 1), url) as (groups, nonce):
        for name, (happens, *_) in STORIES.items():
            for keep in (RetentionPolicy(steps=2), RetentionPolicy(optimizer_states=2)):
                disk = folder / f"{name}, {keep}" / f"disk{rank}"
                disk.mkdir(parents=True)
                save(groups, disk, nonce, OLD, RetentionPolicy())
                if rank == 1:
                    happens(disk)
                gather_json(groups.control, None)
                save(groups, disk, f"{nonce}-again", (NEW,), keep)
                found[f"{name}, {keep}"] = (steps_of(disk), states_of(disk))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return run_ranks(STAGES, live, tmp_path_factory.mktemp("complete-steps"))


@pytest.mark.parametrize("name", STORIES)
def test_only_what_all_stages_have_counts(name: str, found: list[Found]) -> None:
    _, first, second = STORIES[name]
    steps = [of_a_stage[f"{name}, {RetentionPolicy(steps=2)}"][0] for of_a_stage in found]
    assert steps == [first, first if second is None else second]


@pytest.mark.parametrize("name", ["nothing", "gone", "cut weights", "not readable"])
def test_states_stay_of_as_many_steps_that_can_be_gone_on_from(
    name: str, found: list[Found]
) -> None:
    for of_a_stage in found:
        steps, states = of_a_stage[f"{name}, {RetentionPolicy(optimizer_states=2)}"]
        assert states == STORIES[name][1]
        assert set(steps) >= {"2", "5", "10"}


def held(save_name: str, num_stages: int, *stages: int) -> list[StageFiles]:
    return [StageFiles(save_name, num_stages, stage) for stage in stages]


def test_a_step_of_other_stages_counts_where_the_disks_together_have_it() -> None:
    """A checkpoint of one or three stages is complete if the run's two disks together hold it.

    The run has two stages. A checkpoint of two stages is complete only if stage 0's disk holds the
    files of stage 0, and stage 1's disk those of stage 1.
    """
    by_step = {
        1: (held("a", 3, 0, 1), held("a", 3, 1, 2)),
        2: (held("b", 3, 0), held("b", 3, 1)),
        3: (held("c", 2, 0), held("c", 2, 1)),
        4: (held("d", 2, 0, 1), []),
        5: (held("e", 1, 0), []),
        6: (held("f", 2, 0), held("another", 2, 1)),
        7: (held("g", 2, 0) + held("h", 2, 0), held("h", 2, 1)),
    }
    views = [{step: both[stage] for step, both in by_step.items()} for stage in (0, 1)]
    assert complete_steps(views) == [1, 3, 5, 7]
