"""Trains one rank of a run, or previews, plans or checks the run.

Exit status: 0 the run is complete; 2 a user's mistake; 75 the run was stopped by SIGTERM, SIGINT or
SIGUSR1 after a save, and the same command resumes it; 1 anything else, such as a stop that took
longer than --grace-seconds, or a second request to stop.
"""

import os
import sys
from collections.abc import Iterable, Sequence

from arguments.parser import refuse
from arguments.settings import Settings
from arguments.train import parse_train
from comm.lifecycle.stop_signals import StopListener, StopRequest
from comm.timing import DEFAULT_TIMING, Timing
from common.text import one_line
from monitor.logs import setup_logging
from training.startup_checks import check_this_machine

# torch is imported below, after the flags have been checked, and the model's libraries after the
# ranks have met: both take seconds.


def main(argv: Sequence[str] | None = None, timing: Timing = DEFAULT_TIMING) -> None:
    """Runs one rank; a user's mistake ends it with one line on stderr and exit status 2.

    Args:
        argv: the flags; left out, those of the command line.
        timing: the waiting times among the ranks.
    """
    settings = parse_train(argv)
    parallel = settings.parallel
    console = setup_logging(parallel.rank, sys.stdout)
    if settings.output.preview_data is not None:
        preview(settings, settings.output.preview_data)
        return
    if settings.output.plan:
        plan(settings)
        return
    stop = StopRequest()
    alone = parallel.world_size == 1
    listener = StopListener(stop, rank=parallel.rank, alone=alone, timing=timing)
    resources = check_this_machine(settings)
    if resources.problem is not None and alone:
        refuse(resources.problem)
    from training.meeting import meet

    meeting = meet(settings, resources, stop, listener, timing)
    from training.session import run_session

    run_session(settings, resources, meeting, console, stop)


def preview(settings: Settings, num_blocks: int) -> None:
    """Prints the first blocks and the mixture; only rank 0 reads data and prints."""
    if settings.parallel.rank != 0:
        return
    from training.data import preview_data

    try:
        parts = preview_data(settings, num_blocks=num_blocks, colour=sys.stdout.isatty())
        show(f"{part}\n" for part in parts)
    except (ValueError, OSError) as error:
        refuse(ValueError(one_line(error)))


def plan(settings: Settings) -> None:
    """Prints what each stage needs; exit status 1 if that is more than --device-memory."""
    if settings.parallel.rank != 0:
        return
    from planning.memory.plan import MemoryPlan

    try:
        memory_plan = MemoryPlan(settings)
        show(memory_plan.parts())
        fits = memory_plan.fits
    except ValueError as error:
        refuse(error)
    if not fits:
        sys.exit(1)


def show(parts: Iterable[str]) -> None:
    """Prints parts one by one, until the reader closes the pipe.

    Raises:
        ValueError: standard output cannot be written, for example because a disk is full.
    """
    for part in parts:
        try:
            sys.stdout.write(part)
            sys.stdout.flush()
        except OSError as error:  # the rest of the buffer must not fail again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return
            raise ValueError(f"standard output: {error.strerror}") from error


if __name__ == "__main__":
    main()
