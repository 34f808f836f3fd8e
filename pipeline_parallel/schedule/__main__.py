"""A schedule's timetable as text: `python -m pipeline_parallel.schedule`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from pipeline_parallel.schedule.schedules import SCHEDULES, Kind, Schedule
from pipeline_parallel.schedule.simulator import Costs, SimulatedRun, StageCosts, simulate
from pipeline_parallel.schedule.validate import check_schedule, peak_recomputed

IDLE, GOES_ON = ".", "=="
LARGEST = 250  # beyond it nobody reads a timetable

RECOMPUTE_NOTE = """\
With --recompute true, a stage holds the recomputed activations of a microbatch from its
input-gradient action (I) to its weight-gradient action (W), or within B; at the most, by stage:
{} microbatches.
"""


def timetable(timeline: SimulatedRun) -> str:
    """A line for each stage; time runs to the right, a slot for each second of the costs.

    An action of several slots goes on as ==, and an idle slot is a dot. What `timeline` was made
    with must be whole seconds, and at least one for each action.
    """
    rows = [[IDLE] * round(timeline.total) for _ in timeline.peak_live]
    for span in timeline.spans:
        start, end = round(span.start), round(span.end)
        rows[span.stage][start:end] = [str(span.action)] + [GOES_ON] * (end - start - 1)
    width = max(len(str(span.action)) for span in timeline.spans)
    digits = len(str(len(rows) - 1))
    lines = (
        f"stage {stage:<{digits}}   " + " ".join(cell.ljust(width) for cell in row)
        for stage, row in enumerate(rows)
    )
    return "\n".join(line.rstrip() for line in lines) + "\n"


def describe(schedule: Schedule, num_stages: int, num_microbatches: int, costs: StageCosts) -> str:
    """The timetable where every stage has these costs (whole, in slots), and what it comes to."""
    timeline = simulate(schedule, num_stages, num_microbatches, Costs([costs] * num_stages))
    text = timetable(timeline) + (
        f"\ntotal       {timeline.total:.0f} slots"
        f"\nbubble      {100 * timeline.bubble:.1f} %"
        f"\npeak live   {_join(timeline.peak_live)} microbatches, stage by stage\n"
    )
    if all(span.action.kind is not Kind.INPUT_GRADIENT for span in timeline.spans):
        return text
    held = [peak_recomputed(schedule, s, num_stages, num_microbatches) for s in range(num_stages)]
    return text + "\n" + RECOMPUTE_NOTE.format(_join(held))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what `describe` tells; a mistake is one line on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    schedule = SCHEDULES[args.pp_mode]
    check_schedule(schedule, args.stages, args.microbatches)
    costs = StageCosts(args.forward, args.input_gradient, args.weight_gradient)
    sys.stdout.write(describe(schedule, args.stages, args.microbatches, costs))


class _OneLineParser(argparse.ArgumentParser):
    """argparse, whose mistakes are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, " ".join(message.removeprefix("argument ").split()) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m pipeline_parallel.schedule",
        description="Prints when each stage runs which microbatch: F forward, B backward, or its "
        "two parts, I the gradient of the stage's input and W those of its weights. An action of "
        "several slots goes on as ==; an idle slot is a dot. B takes the slots of I and W.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pp-mode", type=_mode, default="gpipe", help=", ".join(SCHEDULES))
    parser.add_argument("--stages", type=_whole, default=4, help="stages of the pipeline")
    parser.add_argument("--microbatches", type=_whole, default=8, help="microbatches of a batch")
    for action, name in (("forward", "F"), ("input-gradient", "I"), ("weight-gradient", "W")):
        parser.add_argument(f"--{action}", type=_whole, default=1, help=f"slots that {name} takes")
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
