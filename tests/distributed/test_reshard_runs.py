"""Tests runs that stop, die or have no shared disk, and resume with another number of stages.

Two pipelines of two stages (three layers, split 2,1) become four pipelines of one stage, or one
pipeline of three stages. Losses must equal the losses of an uninterrupted run.
"""

import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checkpoint.steps.manifest import read_manifest
from tests.support.flags import flags_of
from tests.support.hooks import Kill
from tests.support.kill_lab import WORLD, Lab, leftovers, make_lab, numbers
from tests.support.kill_plan import PUBLISH
from tests.support.launcher import run_ranks
from tests.support.parity import worst
from tests.support.runs import Outcome, fork_ranks

_TRAIN = "pipeline_parallel.engine:Engine.train"
APART = "three stages"
STEPS, STOPPED, SAVED = 10, 6, 8  # SAVED: the first step saved after the stop
LENGTH = flags_of(
    f"--total-steps {STEPS} --checkpoint-steps 4 --evaluation-steps 4 --data-workers 0"
)
FOUR_PIPELINES = flags_of(
    "--pipeline-group-size 1 --data-group-size 4 --batch-size 1 --num-layers 3"
)
THREE_STAGES = flags_of(
    "--pipeline-group-size 3 --data-group-size 1 --world-size 3 --batch-size 4 --num-layers 1"
)
KEEP = flags_of("--keep-checkpoints 2 --keep-optimizer-states 1")
NEEDS = {1: 0, 2: 1}  # new rank (of three): old stage (of two) whose files it needs


@dataclass(frozen=True)
class Seen:
    """The outcome of one start of a run, and rank 0's `latest` and saved steps after this start."""

    outcome: Outcome
    latest: str
    steps: list[str]


def stop_after(rank: int, iterations: int) -> Kill:
    return Kill("", rank, _TRAIN, nth=iterations, signals=(signal.SIGTERM,))


def start(
    lab: Lab, name: str, *kills: Kill, own_disks: bool = False, changes: dict[str, Any]
) -> Seen:
    argvs = lab.argvs(name, own_disks=own_disks, changes=LENGTH | changes)
    argvs = argvs[: int(changes.get("world-size", WORLD))]
    outcome = fork_ranks(argvs, lab.folder, hooks=kills)
    disk = lab.disk(name, 0 if own_disks else None)
    steps = sorted((path.name for path in disk.glob("[0-9]*")), key=int)
    return Seen(outcome, (disk / "latest").read_text(), steps)


def live(_rank: int, _world: int, _url: str, lab: Lab) -> dict[str, Seen]:
    found = {"whole": start(lab, "whole", changes={})}
    found["kept, two stages"] = start(lab, "kept", stop_after(1, STOPPED), changes=KEEP)
    again = KEEP | FOUR_PIPELINES
    # The first save with the other shape; a save renames its folder after the files are complete.
    dies = Kill("", 0, PUBLISH)
    found["kept, dies"] = start(lab, "kept", dies, changes=again)
    found["kept, stopped"] = start(lab, "kept", stop_after(2, 2), changes=again)
    shutil.copytree(lab.disk("kept"), lab.folder / "kept when saved")
    found["kept, back"] = start(lab, "kept", changes=KEEP)
    return found


def live_apart(_rank: int, _world: int, _url: str, lab: Lab) -> dict[str, Seen]:
    """Stops a run whose ranks have separate disks, then resumes it twice with three stages.

    In the first resume, ranks lack files of the checkpoint; in the second, they have all they need.
    """
    never = {"checkpoint-steps": 0}
    found = {
        "stopped": start(lab, APART, stop_after(3, STOPPED), own_disks=True, changes=never),
        "apart": start(lab, APART, own_disks=True, changes=never | THREE_STAGES),
    }
    for rank, stage in NEEDS.items():  # as the ranks' error lines demand
        target = lab.disk(APART, rank) / str(STOPPED)
        shutil.copytree(lab.disk(APART, stage) / str(STOPPED), target, dirs_exist_ok=True)
    found["gathered"] = start(lab, APART, own_disks=True, changes=never | THREE_STAGES)
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("reshard-runs"))


@pytest.fixture(scope="module")
def seen(lab: Lab) -> dict[str, Seen]:
    (found,) = run_ranks(1, live, lab, deadline=400.0)
    return found


def check_losses(lab: Lab, disk: Path) -> None:
    whole, others = numbers(lab.disk("whole")), numbers(disk)
    assert [line["step"] for line in others] == list(range(1, STEPS + 1))
    assert others[:STOPPED] == whole[:STOPPED]
    assert worst([line["loss"] for line in others], [line["loss"] for line in whole]) < 1e-5
    evaluated = [[line.get("eval_loss") for line in lines] for lines in (others, whole)]
    for one, other in zip(*evaluated, strict=True):
        assert one is None or one == pytest.approx(other, rel=1e-5)


def test_machines_are_told_which_files_to_bring_and_go_on_with_them(
    lab: Lab, seen: dict[str, Seen]
) -> None:
    """Every rank's error names the files that ranks lack; with these files, the run resumes."""
    (apart,) = run_ranks(1, live_apart, lab, deadline=400.0)
    assert apart["stopped"].outcome.statuses == [75] * WORLD
    assert apart["apart"].outcome.statuses == [2] * 3
    for (line,) in apart["apart"].outcome.lines:
        for rank, stage in NEEDS.items():
            place = lab.disk(APART, rank) / str(STOPPED)
            words = f"rank {rank} on {socket.gethostname()} needs in {place} "
            files = f"prank_{stage}_{{checkpoint.pt,optimizer.pt,scheduler.pt,manifest.json}}"
            assert words + files in line
    outcome = apart["gathered"].outcome
    assert outcome.statuses == [0] * 3
    words = "the checkpoint's 2 stages of 2,1 layers become 3 of 1,1,1"
    assert any(line.endswith(words) for line in outcome.told[0])
    check_losses(lab, lab.disk(APART, 0))
    for rank in range(3):
        disk = lab.disk(APART, rank)
        assert (disk / "latest").read_text() == str(STEPS)
        assert leftovers(disk) == []
        parts = sorted(path.name for path in (disk / str(STEPS)).glob("prank_*"))
        ends = ("checkpoint.pt", "manifest.json", "optimizer.pt", "scheduler.pt")
        assert parts == [f"prank_{rank}_{end}" for end in ends]


def test_a_death_in_the_first_save_of_other_stages_costs_that_save_alone(
    lab: Lab, seen: dict[str, Seen]
) -> None:
    assert seen["kept, two stages"].outcome.statuses == [75] * WORLD
    assert seen["kept, two stages"].steps == ["4", str(STOPPED)]
    dies = seen["kept, dies"]
    assert dies.outcome.statuses[0] == -signal.SIGKILL
    assert (dies.latest, dies.steps) == (str(STOPPED), ["4", str(STOPPED)])
    assert any(line.startswith(f"resumed from step {STOPPED}") for line in dies.outcome.told[0])


def test_old_steps_of_other_stages_go_as_those_of_these_do(lab: Lab, seen: dict[str, Seen]) -> None:
    """Old steps and optimizer states are deleted, even those saved when the run had more stages."""
    stopped = seen["kept, stopped"]
    assert stopped.outcome.statuses == [75] * WORLD
    assert (stopped.latest, stopped.steps) == (str(SAVED), [str(STOPPED), str(SAVED)])
    kept = lab.folder / "kept when saved"
    assert [path.name for path in kept.glob("*/*_optimizer.pt")] == ["prank_0_optimizer.pt"]
    assert (kept / str(SAVED) / "prank_0_optimizer.pt").exists()
    for step, stages in ((str(STOPPED), 2), (str(SAVED), 1)):
        for stage in range(stages):
            read_manifest(kept / step, stage).check(kept / step)
    assert read_manifest(kept / str(STOPPED), 1).dropped == ["prank_1_optimizer.pt"]


def test_a_run_goes_on_and_back_with_the_same_losses(lab: Lab, seen: dict[str, Seen]) -> None:
    assert seen["kept, back"].outcome.statuses == [0] * WORLD
    words = "the checkpoint's 1 stage of 3 layers becomes 2 of 2,1"
    assert any(line.endswith(words) for line in seen["kept, back"].outcome.told[0])
    check_losses(lab, lab.disk("kept"))
