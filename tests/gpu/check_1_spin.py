"""Check 1: what a kernel that waits on the GPU holds up, as a posted receive of NCCL does.

It needs no peer: see `tests.gpu.spin_lab`. Rows that must hold are those on which training relies:

- After a warm-up, no launch is held while a receive waits.
- A stage that posts receives by the rule is not held, also not by a kernel's first launch.
- With CUDA_DEVICE_MAX_CONNECTIONS=32, compute is not held beside 20 waiting streams.
- The HangDetector reports a receive while a call of CUDA blocks.
- Memory that a message holds leads to an out-of-memory error at once, not to a wait.

The other rows tell how large the danger is that these rules avoid.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.gpu.machine import ROOT
from tests.gpu.report import CheckReport, Options, run_check
from training.gpu_environment import set_gpu_variables

_MARGIN = 8.0  # seconds of the check's limit for its own start and end
_SHORTEST, _LONGEST = 5.0, 40.0  # seconds of one experiment
_STREAMS_NEEDED = 20  # of a middle stage with replicas
_REPORTS_WITHIN = 1.0  # seconds; the detector's limit in the experiment is 0.3 s
_VARIABLES = (
    "CUDA_MODULE_LOADING",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_MAX_P2P_NCHANNELS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)

Result = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """An experiment of the spin lab, and the environment variables of CUDA that it gets."""

    name: str
    environ: Mapping[str, str] = field(default_factory=dict)
    title: str = ""

    @property
    def label(self) -> str:
        """Returns the title or, without one, the variables."""
        if self.title:
            return self.title
        values = [f"{name.removeprefix('CUDA_').lower()} {v}" for name, v in self.environ.items()]
        return ", ".join(values).replace("_", " ") or "default"


_AS_IN_TRAINING = set_gpu_variables({}, deterministic=False) | {"CUDA_MODULE_LOADING": "LAZY"}
_EXPERIMENTS = (
    Experiment("launches", _AS_IN_TRAINING, "as in training"),
    Experiment("beside", _AS_IN_TRAINING, "as in training"),
    Experiment("queues", {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}),
    Experiment("queues"),
    Experiment("queues", {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    Experiment("launches", {"CUDA_MODULE_LOADING": "EAGER"}),
)  # the most important first, if the time does not suffice


def check(report: CheckReport, options: Options) -> None:
    """Runs the experiments one after another, each in a process of its own."""
    if not options.is_cuda:
        report.not_here("it needs a GPU")
        return
    deadline = time.monotonic() + options.limit - _MARGIN
    processes = [_start(experiment) for experiment in _EXPERIMENTS]
    try:
        for experiment, process in zip(_EXPERIMENTS, processes, strict=True):
            left = min(_LONGEST, deadline - time.monotonic())
            name = f"{experiment.name} ({experiment.label})"
            if left < _SHORTEST:
                report.measure(f"left out, no time: {name}", "")
                continue
            result = _result(process, left)
            report.expect(f"the experiment ends: {name}", result is not None)
            if result is not None:
                add_rows(report, experiment, result)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def add_rows(report: CheckReport, experiment: Experiment, result: Result) -> None:
    """Adds the rows of one experiment's result."""
    if experiment.name == "launches":
        _launch_rows(report, experiment.label, result)
    elif experiment.name == "queues":
        is_ours = experiment.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "32"
        _queue_rows(report, experiment.label, result, is_ours=is_ours)
    else:
        for name, part in result.items():
            if "error" in part:
                report.expect(f"{name}: no exception", False, note=part["error"])
            else:
                _ROWS[name](report, part)


def _start(experiment: Experiment) -> "subprocess.Popen[str]":
    """Starts an experiment's process, which imports its modules and waits for its turn."""
    environ = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.spin_lab", experiment.name],
        cwd=ROOT,
        env={**environ, **experiment.environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _result(process: "subprocess.Popen[str]", limit: float) -> Result | None:
    """Lets an experiment run for at most `limit` seconds; returns None if it does not end well."""
    try:
        output, _ = process.communicate(f"{limit}\n", timeout=limit + 1)
        result: Result = json.loads(output.splitlines()[-1])
        return result
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        process.kill()
        return None


def _launch_rows(report: CheckReport, label: str, result: Result) -> None:
    for call in result["calls"]:
        name = f"{label}: {call['name']}"
        note = "HELD" if call["held"] else "free"
        note += (
            f"; event.query {call['query']:.3f} s, other threads stopped {call['stopped']:.3f} s"
        )
        note += f"; {call['error']}" if call["error"] else ""
        if call["name"].endswith("again"):
            fine = not call["held"] and not call["error"]
            report.expect(name, fine, call["seconds"], "s", note)
        else:
            report.measure(name, call["seconds"], "s", note)


def _queue_rows(report: CheckReport, label: str, result: Result, *, is_ours: bool) -> None:
    for priority, held in result["held"].items():
        name = f"{label}: compute held beside streams of {priority} priority"
        value = ", ".join(map(str, held)) or "none"
        note = f"of {', '.join(map(str, result['streams']))} waiting streams"
        if is_ours and priority == "high":
            report.expect(name, all(n > _STREAMS_NEEDED for n in held), value, "", note)
        else:
            report.measure(name, value, "", note)


def _posting_rows(report: CheckReport, result: Result) -> None:
    hold = result["hold"]
    for name in ("early, cold", "early, warm"):
        report.measure(
            f"two messages, posted {name}", result[name], "s", f"a receive waits {hold} s"
        )
    for name in ("rule, cold", "rule, warm"):
        report.expect(
            f"two messages, posted by the {name}", result[name] < hold, result[name], "s",
            f"less than {hold} s",
        )  # fmt: skip


def _detector_rows(report: CheckReport, result: Result) -> None:
    reported = result["reported"]
    report.measure("a cold launch beside a waiting receive", result["launched"], "s")
    report.expect(
        "the HangDetector reports while the launch is held",
        reported is not None and reported < _REPORTS_WITHIN,
        "never" if reported is None else reported,
        "s",
        f"within {_REPORTS_WITHIN} s; the receive waits {result['hold']} s",
    )


def _allocator_rows(report: CheckReport, result: Result) -> None:
    hold, recorded, held = result["hold"], result["recorded"], result["held"]
    name = "allocation beside a recorded block (record_stream)"
    report.measure(
        name, recorded["seconds"], "s", f"{recorded['outcome']}; the stream waits {hold} s"
    )
    at_once = held["outcome"] == "out of memory" and held["seconds"] < hold / 2
    name = "allocation beside a held block fails at once"
    report.expect(name, at_once, held["seconds"], "s", held["outcome"])


def _theft_rows(report: CheckReport, result: Result) -> None:
    times = result["milliseconds"]
    for blocks, milliseconds in times.items():
        name = f"matmul 8192 x 4096 x 8192 beside {blocks} waiting blocks"
        if milliseconds is None:
            report.measure(name, "held", "", "until the blocks ended")
        else:
            report.measure(name, milliseconds, "ms", f"x {milliseconds / times['0']:.3f}")


_ROWS = {
    "posting": _posting_rows,
    "detector": _detector_rows,
    "allocator": _allocator_rows,
    "theft": _theft_rows,
}

if __name__ == "__main__":
    run_check(check)
