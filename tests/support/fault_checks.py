"""Checks of a run with faults: how its ranks ended, and whether its files are correct."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from checkpoint.steps.latest import check_latest
from checkpoint.steps.manifest import read_manifest
from monitor.metrics import read_metrics
from tests.support.fault_injector import Hit
from tests.support.fault_plan import CUT, FULL, KILL, STOP, TERM, UNPLUGGED, RunPlan
from tests.support.kill_lab import STAGES, WORLD, leftovers, numbers, same, state
from tests.support.phases import JOINING
from tests.support.runs import Outcome

if TYPE_CHECKING:
    from tests.support.fault_lab import FaultLab

ENDS = {KILL: 12.0, STOP: 22.0, CUT: 22.0, TERM: 25.0, UNPLUGGED: 22.0}
ENDS_JOINING = 24.0
_EVALUATED = ("eval_loss", "eval_perplexity")


def misbehaviour(hits: Sequence[Hit], outcome: Outcome, seconds: float | None) -> list[str]:
    """Returns the problems with how the ranks ended (status, stderr, time); empty if none."""
    hung = [rank for rank, status in enumerate(outcome.statuses) if status is None]
    if hung:
        return [f"ranks {hung} hung: {outcome.lines}"]
    if outcome.statuses == [0] * WORLD:
        return [f"stderr: {outcome.lines}"] if any(outcome.lines) else []
    if not hits:
        return [f"failed undisturbed: {outcome.statuses}: {outcome.lines}"]
    found = [_after(hit, outcome, hits[-1].at, seconds or 0.0) for hit in hits]
    return [] if not all(found) else found[-1]


def _after(hit: Hit, outcome: Outcome, last: float, seconds: float) -> list[str]:
    """Returns the problems with how the ranks ended, on the assumption that `hit` ended them."""
    fault, problems = hit.fault, []
    limit = ENDS_JOINING if hit.phase in JOINING else ENDS.get(fault.kind)
    if limit is not None and seconds + last - hit.at > limit:
        problems.append(f"ended {seconds:.1f} s after {fault.kind}, not within {limit:g}")
    for rank in range(WORLD):
        if wrong := _ending(rank, hit, outcome):
            problems.append(f"after {fault.kind} of rank {fault.rank} in {hit.phase}: {wrong}")
    return problems


def _ending(rank: int, hit: Hit, outcome: Outcome) -> str | None:
    """Returns the problem with how a rank ended, or None."""
    fault, status, lines = hit.fault, outcome.statuses[rank], outcome.lines[rank]
    told = f"rank {rank} ended with {status}: {lines}"
    if fault.kind in (KILL, STOP) and rank == fault.rank:
        return None if status == -9 else told
    if fault.kind == TERM and hit.phase in JOINING and rank == fault.rank and status == -15:
        return None  # the signal came before the rank had set its handler
    if status == 0 and not lines:  # this rank had already completed
        return None
    return None if status in _statuses(hit) and _names(hit, rank, lines) else told


def _statuses(hit: Hit) -> tuple[int, ...]:
    joining = hit.phase in JOINING
    if hit.fault.kind == TERM:
        return (75, 1) if joining else (75,)
    return (1, 2) if joining else (1,)


def _names(hit: Hit, rank: int, lines: Sequence[str]) -> bool:
    """Returns whether the rank's stderr is one line that names a lost rank or the fault."""
    if len(lines) != 1:
        return False
    fault, text = hit.fault, lines[0].removeprefix(f"rank {rank}: ")
    if hit.phase in JOINING and "could not all connect" in text:
        return "this one over" in text  # an error can only name this rank's own interface
    if fault.kind == FULL:
        return "is not saved" in text or "latest does not name it" in text
    if fault.kind == TERM and fault.to_all:
        return "SIGTERM on rank" in text
    if fault.kind in (KILL, STOP, TERM):
        return f"rank {fault.rank}" in lines[0]
    return re.search(r"rank \d", text) is not None


def damage(lab: "FaultLab", name: str) -> list[str]:
    """Returns what is damaged in the checkpoint that `latest` names.

    The project's own check runs first, then a comparison with the same step of the undisturbed run.
    """
    found = []
    for stage in range(STAGES):
        disk = lab.stage_disk(name, stage)
        if not (disk / "latest").exists():
            continue
        step = int((disk / "latest").read_text())
        try:
            check_latest(disk, has_manifests=True)
            read_manifest(disk / str(step), stage).check(disk / str(step))
            expected = state(lab.stage_disk("whole", stage), stage, step)
            if not same(state(disk, stage, step), expected):
                found.append(f"step {step} of stage {stage} has other bits")
        except Exception as error:  # any damage
            found.append(f"step {step} of stage {stage}: {error!r}")
    return found


def differences(
    lab: "FaultLab", name: str, plan: RunPlan, statuses: Sequence[int | None]
) -> list[str]:
    """Returns how the files at the end of a run differ from the files of the undisturbed run."""
    disk, whole = lab.stage_disk(name, 0), lab.stage_disk("whole", 0)
    steps = lab.lab.steps
    if list(statuses) != [0] * WORLD:
        return [f"not complete: {statuses}"]
    stopped = any(fault.kind == TERM for faults in plan.starts for fault in faults)
    found = _other_lines(numbers(disk), numbers(whole), stopped=stopped)
    if len(read_metrics(disk / "metrics.jsonl")) != steps:
        found.append("not one line a step")
    for stage in range(STAGES):
        there = lab.stage_disk(name, stage)
        if (there / "latest").read_text() != str(steps):
            found.append(f"stage {stage}: latest is not the last step")
        whole_state = state(lab.stage_disk("whole", stage), stage, steps)
        if not same(state(there, stage, steps), whole_state):
            found.append(f"stage {stage}: other weights or moments at the end")
        if left := leftovers(there):
            found.append(f"stage {stage}: left behind: {left}")
    return found


def _other_lines(
    lines: list[dict[str, object]], expected: list[dict[str, object]], *, stopped: bool
) -> list[str]:
    """Describes lines that differ from `expected`; `stopped` allows lines without evaluations."""
    found = []
    for line, other in zip(lines, expected, strict=False):
        left_out = {key: other[key] for key in other if key not in _EVALUATED}
        if line != other and not (stopped and line == left_out):
            found.append(f"step {other['step']}: {line}, undisturbed {other}")
    return found
