"""The command `python -m pipeline_parallel.schedule`, which prints a schedule's timetable."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from pipeline_parallel.schedule.schedules import SCHEDULES, Kind, Schedule
from pipeline_parallel.schedule.simulator import Costs, SimulatedRun, StageCosts, simulate
from pipeline_parallel.schedule.validate import check_schedule, peak_recomputed

IDLE, CONTINUES = ".", "=="
LARGEST = 250  # a larger timetable is not readable

RECOMPUTE_NOTE = """\
With --recompute true, the recomputed activations of a microbatch are in memory from its
input-gradient action (I) to its weight-gradient action (W), or within B; at most, stage by stage:
{} microbatches.
"""


def timetable(run: SimulatedRun) -> str:
    """Returns the timetable of a simulated run, with one line for each stage.

    Time runs from left to right. Each column is a slot: one second of the simulated time. An action
    of several slots continues as ==, and an idle slot is a dot. The time of each action in `run`
    must be an integer number of seconds, at least 1.
    """
    rows = [[IDLE] * round(run.total) for _ in run.peak_in_flight]
    for stage, action, start_second, end_second in run.actions:
        start, end = round(start_second), round(end_second)
        rows[stage][start:end] = [str(action)] + [CONTINUES] * (end - start - 1)
    width = max(len(str(scheduled.action)) for scheduled in run.actions)
    digits = len(str(len(rows) - 1))
    lines = (
        f"stage {stage:<{digits}}   " + " ".join(cell.ljust(width) for cell in row)
        for stage, row in enumerate(rows)
    )
    return "\n".join(line.rstrip() for line in lines) + "\n"


def describe(schedule: Schedule, num_stages: int, num_microbatches: int, costs: StageCosts) -> str:
    """Returns a text: a schedule's timetable, total time, bubble, and microbatches in flight.

    `costs` has the number of time slots of each action; the number is the same on every stage.
    """
    run = simulate(schedule, num_stages, num_microbatches, Costs([costs] * num_stages))
    text = timetable(run) + (
        f"\ntotal       {run.total:.0f} slots"
        f"\nbubble      {100 * run.bubble:.1f} %"
        f"\nin flight   at most {_join(run.peak_in_flight)} microbatches, stage by stage\n"
    )
    if all(scheduled.action.kind is not Kind.INPUT_GRADIENT for scheduled in run.actions):
        return text
    stages = range(num_stages)
    recomputed = [peak_recomputed(schedule, s, num_stages, num_microbatches) for s in stages]
    return text + "\n" + RECOMPUTE_NOTE.format(_join(recomputed))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the timetable of the schedule that the flags choose.

    A wrong flag ends the command with exit status 2 and one line on stderr.
    """
    args = _parser().parse_args(argv)
    schedule = SCHEDULES[args.pp_mode]
    check_schedule(schedule, args.stages, args.microbatches)
    costs = StageCosts(args.forward, args.input_gradient, args.weight_gradient)
    sys.stdout.write(describe(schedule, args.stages, args.microbatches, costs))


class _OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, " ".join(message.removeprefix("argument ").split()) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m pipeline_parallel.schedule",
        description="Prints a timetable of the microbatches on each stage. F is forward and B is "
        "backward. Some schedules split B into I, the gradient of the stage's input, and W, the "
        "gradients of the stage's weights. An action of several slots continues as ==; an idle "
        "slot is a dot. B takes the slots of I and W together.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pp-mode", type=_mode, default="gpipe", help=", ".join(SCHEDULES))
    parser.add_argument("--stages", type=_whole, default=4, help="number of stages")
    parser.add_argument("--microbatches", type=_whole, default=8, help="number of microbatches")
    for action, name in (("forward", "F"), ("input-gradient", "I"), ("weight-gradient", "W")):
        parser.add_argument(
            f"--{action}", type=_whole, default=1, help=f"duration of {name}, in slots"
        )
    return parser


def _mode(text: str) -> str:
    if text not in SCHEDULES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(SCHEDULES)}, got {text!r}")
    return text


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= LARGEST:
        wanted = f"expected a whole number from 1 to {LARGEST}"
        raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}")
    return value


def _join(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


if __name__ == "__main__":
    main()
