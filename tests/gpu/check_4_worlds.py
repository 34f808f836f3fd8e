"""Check 4: two replicas of two stages over gloo, on one device, and a resume after SIGKILL.

The losses are those of one process. All ranks are killed between two saves of --async-checkpoint;
started again, the run has the bits of a run that nobody killed.
"""

import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arguments.flag_table import FLAGS
from monitor.metrics import read_metrics
from tests.gpu.report import CheckReport, Options, run_check
from tests.gpu.worlds import (
    Clock,
    World,
    disk,
    expect_losses,
    finish,
    metric,
    reason,
    run_worlds,
    start_inputs,
    succeeded,
)
from tests.support.hooks import Slow
from tests.support.runs import Outcome

# In fp32 one process and four ranks differ only in the order in which they add the gradients of the
# replicas: some 1e-7 of a gradient. The project promises 1e-5 of the loss.
WITHIN = 1e-5
STEPS, SAVE = 8, 2
KEPT = ("loss", "lr", "grad_norm")
# Slow steps, so that the kill comes between two of them; and slower writes, so that weights change
# before their copy is written.
SLOW = [
    Slow(0, "pipeline_parallel.engine:Engine.train", 0.1),
    *(Slow(rank, "checkpoint.steps.folder:write_stage_files", 0.6) for rank in (0, 1)),
]
DETERMINISTIC = any(flag.name == "--deterministic" for flag in FLAGS)


@dataclass
class KillAll:
    """Sends SIGKILL to all ranks at once, as soon as a step after the first save is done.

    steps: the number of complete steps at that time; 0: no rank was killed.
    """

    path: Path
    steps: int = 0

    def __call__(self, pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
        if self.steps or ended or not (self.path / "latest").exists():
            return
        steps = len(read_metrics(self.path / "metrics.jsonl"))
        if steps > int((self.path / "latest").read_text()):
            self.steps = steps
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def check(report: CheckReport, options: Options) -> None:
    clock = Clock(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finish(start_inputs(folder, options), within=clock.share(2))
        flags = f"--total-steps {STEPS} --checkpoint-steps {SAVE} --async-checkpoint"
        if options.is_cuda and DETERMINISTIC:
            flags += " --deterministic"
        alone = World("one process", flags=flags)
        whole = World("four ranks", 2, 2, f"{flags} --pp-mode 1f1b")
        kill = KillAll(disk(folder, World("killed")))
        killed = replace(whole, name="killed", attend=kill, hooks=SLOW)
        resumed = replace(whole, name="resumed", disk=killed.name)
        chains = [[alone], [whole], [killed, resumed]]
        outcomes = run_worlds(chains, folder, options, clock)
        expect_losses(
            report,
            "four ranks, P = 2 and R = 2: losses of one process",
            outcomes[whole.name],
            metric(folder, whole),
            metric(folder, alone),
            tolerance=WITHIN,
        )
        _expect_kill(report, outcomes[killed.name], kill)
        _expect_resume(report, outcomes[resumed.name], folder, whole, resumed)


def _expect_kill(report: CheckReport, outcome: Outcome, kill: KillAll) -> None:
    all_killed = outcome.statuses == [-signal.SIGKILL] * len(outcome)
    between = 0 < kill.steps < STEPS
    note = "" if all_killed else f"exit statuses {outcome.statuses}"
    report.expect("SIGKILL of all ranks", all_killed and between, kill.steps, "steps", note)


def _expect_resume(
    report: CheckReport, outcome: Outcome, folder: Path, whole: World, resumed: World
) -> None:
    """Adds the rows of the resumed run: it begins after a save, and has the bits of `whole`."""
    if not succeeded(outcome):
        report.expect("the killed run resumes", False, note=reason(outcome))
        return
    lines = read_metrics(disk(folder, resumed) / "metrics.jsonl")
    first = [line["step"] for line in lines if line.get("resumed")]
    from_save = len(first) == 1 and first[0] > SAVE and first[0] % SAVE == 1
    report.expect("the killed run resumes after a save", from_save, str(first), "step")
    expected = read_metrics(disk(folder, whole) / "metrics.jsonl")
    same = [
        {key: line[key] for key in KEPT} == {key: other[key] for key in KEPT}
        for line, other in zip(lines, expected, strict=False)
    ]
    report.expect(
        "the resumed run has the bits of the run that nobody killed",
        len(lines) == len(expected) == STEPS and all(same),
        f"{sum(same)} of {STEPS}",
        "steps",
        "with --deterministic" if "deterministic" in whole.flags else "",
    )


if __name__ == "__main__":
    run_check(check)
