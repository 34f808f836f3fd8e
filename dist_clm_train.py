"""Entry script of one rank: trains, previews the data, plans the memory or checks the cluster.

Exit statuses:
    0: the run is complete.
    1: a failure that is not a mistake of the user, for example a stop that took longer than
        --grace-seconds, or a second request to stop.
    2: the user made a mistake.
    75: SIGTERM, SIGINT or SIGUSR1 stopped the run without a loss of progress; the same command
        resumes the run.
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
from training.gpu_environment import set_gpu_variables
from training.startup_checks import check_this_machine

# torch is imported below, after the flags have been checked, and the model's libraries after the
# ranks have met, because both imports take seconds.


def main(argv: Sequence[str] | None = None, timing: Timing = DEFAULT_TIMING) -> None:
    """Runs one rank; on a user's mistake, exits with one line on stderr and status 2.

    Args:
        argv: the flags; None: the flags of this process's command line.
        timing: the waiting times of rendezvous, heartbeats and exit.
    """
    settings = parse_train(argv)
    parallel = settings.parallel
    console = setup_logging(parallel.rank, sys.stdout)
    if settings.output.preview_data is not None:
        preview(settings, settings.output.preview_data)
        return
    gpu_variables: dict[str, str] = {}
    if parallel.use_cuda is not False:  # before torch is imported; a plan counts their effect
        gpu_variables = set_gpu_variables(
            os.environ, deterministic=settings.precision.deterministic
        )
    if settings.output.plan:
        plan(settings)
        return
    stop = StopRequest()
    alone = parallel.world_size == 1
    listener = StopListener(stop, rank=parallel.rank, alone=alone, timing=timing)
    resources = check_this_machine(settings)
    resources.gpu_variables = gpu_variables
    if resources.problem is not None and alone:
        refuse(resources.problem)
    from training.meeting import meet

    meeting = meet(settings, resources, stop, listener, timing)
    from training.session import run_session

    run_session(settings, resources, meeting, console, stop)


def preview(settings: Settings, num_blocks: int) -> None:
    """Prints the first blocks of the data and a table of its sources; only rank 0 does this."""
    if settings.parallel.rank != 0:
        return
    from training.data import preview_data

    try:
        parts = preview_data(settings, num_blocks=num_blocks, colour=sys.stdout.isatty())
        show(f"{part}\n" for part in parts)
    except (ValueError, OSError) as error:
        refuse(ValueError(one_line(error)))


def plan(settings: Settings) -> None:
    """Prints the memory of each stage; exits with status 1 if a stage exceeds --device-memory."""
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
    """Prints the parts one after another; stops when the reader closes the pipe.

    Raises:
        ValueError: a write to standard output fails, for example because the disk is full.
    """
    for part in parts:
        try:
            sys.stdout.write(part)
            sys.stdout.flush()
        except OSError as error:  # the exit must not fail again on the rest of the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return
            raise ValueError(f"standard output: {error.strerror}") from error


if __name__ == "__main__":
    main()
