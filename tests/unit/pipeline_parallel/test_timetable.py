"""Tests the command line of `python -m pipeline_parallel.schedule`, and its output."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_parallel.schedule.__main__ import main, timetable
from pipeline_parallel.schedule.schedules import SCHEDULES, forward_only
from pipeline_parallel.schedule.simulator import Costs, StageCosts, simulate

ROOT = Path(__file__).parents[3]

ZB_H1 = """\
stage 0   F0 F1 F2 F3 .  .  .  B0 == F4 B1 == F5 B2 == F6 B3 == F7 B4 == B5 == B6 == B7 ==
stage 1   .  F0 F1 F2 .  .  I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 F6 I4 W3 F7 I5 W4 I6 W5 I7 W6 W7
stage 2   .  .  F0 F1 .  I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 F6 I5 W3 F7 I6 W4 I7 W5 W6 W7
stage 3   .  .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7

total       27 slots
bubble      11.1 %
in flight   at most 4 4 4 4 microbatches, stage by stage

With --recompute true, the recomputed activations of a microbatch are in memory from its
input-gradient action (I) to its weight-gradient action (W), or within B; at most, stage by stage:
1 2 3 4 microbatches.
"""

WIDE_1F1B = """\
stage 0   F0 == F1 == .  .  .  .  B0 == == == .  .  B1 == == ==
stage 1   .  .  F0 == B0 == == == F1 == B1 == == == .  .  .  .

total       18 slots
bubble      33.3 %
in flight   at most 2 1 microbatches, stage by stage
"""

MISTAKES = {
    "--stages 0": "--stages: expected a whole number from 1 to 250, got '0'",
    "--stages": "--stages: expected one argument",
    "--microbatches -3": "--microbatches: expected a whole number from 1 to 250, got '-3'",
    "--microbatches 1.5": "--microbatches: expected a whole number from 1 to 250, got '1.5'",
    "--microbatches 251": "--microbatches: expected a whole number from 1 to 250, got '251'",
    "--forward 0": "--forward: expected a whole number from 1 to 250, got '0'",
    "--input-gradient x": "--input-gradient: expected a whole number from 1 to 250, got 'x'",
    "--weight-gradient inf": "--weight-gradient: expected a whole number from 1 to 250, got 'inf'",
    "--pp-mode zb-h2": f"--pp-mode: expected one of {', '.join(SCHEDULES)}, got 'zb-h2'",
    "--stage 4": "unrecognized arguments: --stage 4",
    "two\nlines": "unrecognized arguments: two lines",
}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_prints_the_timetable_and_what_it_comes_to() -> None:
    flags = "--pp-mode zb-h1 --stages 4 --microbatches 8"
    done = run(*["-W", "error", "-m", "pipeline_parallel.schedule"], *flags.split())
    assert (done.returncode, done.stdout, done.stderr) == (0, ZB_H1, "")


@pytest.mark.parametrize("flags", MISTAKES)
def test_each_mistake_is_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags.split(" "))
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", MISTAKES[flags] + "\n")


def test_slots_may_be_wider(capsys: pytest.CaptureFixture[str]) -> None:
    slots = "--forward 2 --input-gradient 3 --weight-gradient 1"
    main(f"--pp-mode 1f1b --stages 2 --microbatches 2 {slots}".split())
    assert capsys.readouterr().out == WIDE_1F1B


def test_names_of_two_digits_keep_the_columns() -> None:
    run = simulate(forward_only, 11, 11, Costs([StageCosts(1, 1, 1)] * 11))
    lines = timetable(run).splitlines()
    forwards = "F0  F1  F2  F3  F4  F5  F6  F7  F8  F9  F10"
    assert lines[0] == f"stage 0    {forwards}" + " .  " * 9 + " ."
    assert lines[10] == "stage 10   " + ".   " * 10 + forwards


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; from pipeline_parallel.schedule import __main__; "
        "names = {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names); "
        "sys.stdout.write(' '.join(sorted(names - {'__main__'})))"
    )
    done = run("-S", "-c", code)
    assert (done.stdout, done.stderr) == ("pipeline_parallel", "")
