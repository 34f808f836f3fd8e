"""The work of one rank, from the connection to the other ranks to the exit of the process.

If a run fails or stops on one rank, it ends on every rank: each rank prints one line with the
reason, and all ranks have the same exit status.
"""

import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple, NoReturn

from transformers.utils import logging as transformers_logging

from arguments.settings import Settings
from comm.communicator import PeerLostError
from comm.lifecycle.exit import report_line
from comm.lifecycle.stop_signals import CLOSING, STOPPED, StopRequest
from comm.liveness.failure_policy import ExitPolicy
from comm.process_groups import create_process_groups
from comm.run_context import RunContext
from common.text import one_line
from monitor.console import Console
from planning.cluster.check import check_cluster
from training.device import choose_backends, choose_device, use_deterministic_cuda
from training.gpu_environment import log_gpu_variables
from training.iteration import TrainingStoppedError
from training.meeting import Meeting
from training.run import train
from training.startup_checks import LocalResources


class End(NamedTuple):
    """The exit status of a run that raised no error; if it stopped early, `line` says why."""

    status: int
    line: str | None = None


def run_session(
    settings: Settings,
    resources: LocalResources,
    meeting: Meeting,
    console: Console,
    stop: StopRequest,
) -> None:
    """Checks the cluster or trains a model; ends the process if the run did not complete."""
    policy = meeting.policy
    closing = ExitStack()  # slow cleanup, which runs after the other ranks know of a failure
    try:
        if resources.problem is not None:
            raise resources.problem
        settings, context = _connect(settings, meeting)
        if context.rank == 0 and context.is_cuda:
            log_gpu_variables(resources.gpu_variables)
        if settings.output.check_cluster:
            end = End(check_cluster(settings, context, meeting.rendezvous))
        else:
            stopped = train(settings, context, console=console, stop=stop, closing=closing)
            end = End(0) if stopped is None else End(STOPPED, stopped)
        stop.phase = CLOSING
        closing.close()
        context.groups.close()
    except PeerLostError as error:
        policy.operation_failed(error, before_exit=closing.close)
    except (TrainingStoppedError, OSError) as error:
        policy.fail(1, one_line(error), before_exit=closing.close)
    except ValueError as error:
        policy.fail(2, one_line(error), before_exit=closing.close)
    except Exception as error:
        _fail_with_traceback(policy, error, before_exit=closing.close)
    policy.detector.close()
    if end.line is not None:
        parallel = settings.parallel
        alone = parallel.world_size == 1
        report_line(end.line if alone else f"rank {parallel.rank}: {end.line}")
    if end.status:
        sys.exit(end.status)


def _connect(settings: Settings, meeting: Meeting) -> tuple[Settings, RunContext]:
    """Chooses the device and connects the ranks; the returned settings name the chosen backends."""
    transformers_logging.set_verbosity_error()
    rendezvous = meeting.rendezvous
    device = choose_device(
        settings.parallel,
        use_offload=settings.precision.use_offload,
        ranks_here=len(rendezvous.ranks_on_this_host),
    )
    if settings.precision.deterministic and device.type == "cuda":
        use_deterministic_cuda()
    dist_backend, dp_backend = choose_backends(settings.parallel, device)
    groups = create_process_groups(
        meeting.topology,
        rendezvous,
        dist_backend=dist_backend,
        dp_backend=dp_backend,
        device=device,
        dist_timeout=settings.network.dist_timeout,
        policy=meeting.policy,
        measures_links=settings.output.check_cluster,
    )
    context = RunContext(meeting.topology, groups, device, rendezvous.nonce)
    return settings.changed(dist_backend=dist_backend, dp_backend=dp_backend), context


def _fail_with_traceback(
    policy: ExitPolicy, error: Exception, *, before_exit: Callable[[], object]
) -> NoReturn:
    """Ends the run after an unexpected error; this rank also prints a traceback."""
    traceback.print_exc()
    causes = [error, error.__cause__] if error.__cause__ is not None else [error]
    line = ": ".join(f"{type(cause).__name__}: {one_line(cause)}" for cause in causes)
    policy.fail(1, line, before_exit=before_exit)
