"""Training runs in which random faults happen; each run is started again until it is complete."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.fault_checks import damage, differences, misbehaviour
from tests.support.fault_injector import Hit, Injector
from tests.support.fault_plan import Fault, RunPlan
from tests.support.hosts import Host
from tests.support.kill_lab import STAGES, STEPS, WORLD, WRITERS, Lab, make_lab
from tests.support.launcher import free_port
from tests.support.runs import Outcome, fork_ranks

JOIN, HANG, GRACE = 12.0, 8.0, 20.0  # seconds: --join-timeout, --dist-timeout, --grace-seconds
_LONGEST = 120.0  # seconds; limit of one start
_RESTARTS = 3  # more than the number of faults


@dataclass(frozen=True)
class FaultLab:
    """Lab for runs with faults; with `hosts`, each stage has a host, each rank has its own disk."""

    lab: Lab
    hosts: Sequence[Host] = ()

    def stage_disk(self, name: str, stage: int) -> Path:
        return self.lab.disk(name, WRITERS[stage] if self.hosts else None)

    def injector(self, name: str, faults: Sequence[Fault], life: float) -> Injector:
        metrics = self.stage_disk(name, 0) / "metrics.jsonl"
        steps = self.lab.steps
        return Injector(faults, steps=steps, life=life, metrics=metrics, hosts=self.hosts)

    def start(self, name: str, changes: dict[str, Any], injector: Injector) -> Outcome:
        if self.hosts:
            changes = {**changes, "dist-url": f"tcp://{self.hosts[0].address}:{free_port()}"}
        return fork_ranks(
            self.lab.argvs(name, own_disks=bool(self.hosts), changes=changes),
            self.lab.folder,
            hooks=injector.armed(),
            seconds=_LONGEST,
            attend=injector.attend,
            hosts=[self.hosts[rank % STAGES].name for rank in range(WORLD)] if self.hosts else None,
        )


@dataclass(frozen=True)
class Start:
    """One start of a run; `seconds` is the time from the last fault until all ranks ended."""

    hits: list[Hit]
    missed: list[Fault]
    statuses: list[int | None]
    seconds: float | None
    problems: list[str]


@dataclass(frozen=True)
class Lived:
    """One run with all its starts; `problems` are the problems found after the last start."""

    plan: RunPlan
    starts: list[Start]
    problems: list[str]


def make_fault_lab(folder: Path, hosts: Sequence[Host] = (), *, steps: int = STEPS) -> FaultLab:
    made = make_lab(folder, steps)
    flags = {**made.flags, "join-timeout": JOIN, "dist-timeout": HANG, "grace-seconds": GRACE}
    if hosts:
        del flags["net-interface"]
    return FaultLab(replace(made, flags=flags), hosts)


def live(
    _rank: int, _world: int, _url: str, lab: FaultLab, plans: Sequence[RunPlan], log: Path
) -> list[Lived]:
    """Runs the plans in sequence, compares each run with an undisturbed run, and logs each run."""
    life = _undisturbed(lab)
    lived = []
    for plan in plans:
        lived.append(_live_one(lab, plan, life))
        with log.open("a") as file:
            file.write(tell(lived[-1]) + "\n")
    return lived


def _undisturbed(lab: FaultLab) -> float:
    """Makes the reference files in a run without faults; returns the seconds of a second run."""
    whole = lab.start("whole", {"checkpoint-steps": 2}, lab.injector("whole", [], life=1.0))
    began = time.monotonic()
    again = lab.start("again", {}, lab.injector("again", [], life=1.0))
    assert whole.statuses == again.statuses == [0] * WORLD, (whole, again)
    return time.monotonic() - began


def _live_one(lab: FaultLab, plan: RunPlan, life: float) -> Lived:
    name, starts = f"run{plan.number}", list[Start]()
    for faults in [*plan.starts, *[[]] * _RESTARTS]:
        starts.append(_start(lab, name, plan, faults, life))
        if starts[-1].statuses == [0] * WORLD:
            break
    return Lived(plan, starts, differences(lab, name, plan, starts[-1].statuses))


def _start(lab: FaultLab, name: str, plan: RunPlan, faults: Sequence[Fault], life: float) -> Start:
    injector = lab.injector(name, faults, life)
    try:
        outcome = lab.start(name, dict(plan.changes), injector)
        ended = time.monotonic()
    finally:
        injector.close()
    hits = injector.hits
    seconds = ended - hits[-1].at if hits else None
    problems = misbehaviour(hits, outcome, seconds) + damage(lab, name)
    missed = [fault for fault in faults if fault not in [hit.fault for hit in hits]]
    return Start(hits, missed, outcome.statuses, seconds, problems)


def tell(lived: Lived) -> str:
    """Returns a description of a run in a few lines."""
    lines = [f"run {lived.plan.number} {dict(lived.plan.changes)}"]
    for start in lived.starts:
        hits = [f"{hit.fault} in {hit.phase}" for hit in start.hits]
        after = "" if start.seconds is None else f", {start.seconds:.1f} s after"
        lines.append(f"  {'; '.join(hits) or 'nothing'}: {start.statuses}{after}")
        lines += [f"    missed: {fault}" for fault in start.missed]
        lines += [f"    WRONG: {problem}" for problem in start.problems]
    return "\n".join([*lines, *(f"  WRONG: {problem}" for problem in lived.problems)])


def report(lived: Sequence[Lived]) -> str:
    """Returns a text with the number of starts, faults and failures in all runs."""
    starts = [start for one in lived for start in one.starts]
    hits = [hit for start in starts for hit in start.hits]
    kinds, phases = Counter(hit.fault.kind for hit in hits), Counter(hit.phase for hit in hits)
    lines = [
        f"{len(lived)} runs, {len(starts)} starts, {len(starts) - len(lived)} of them restarts",
        f"{len(hits)} faults: {_counts(kinds)}",
        f"by what their rank was doing: {_counts(phases)}",
        f"not reached, as the run had ended: {sum(len(start.missed) for start in starts)}",
        f"failures: {sum(bool(problems(one)) for one in lived)}",
    ]
    return "\n".join(lines)


def problems(lived: Lived) -> list[str]:
    """Returns all problems of a run."""
    return [*(problem for start in lived.starts for problem in start.problems), *lived.problems]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
