"""A rank from the meeting of all ranks to the exit of its process.

However a run ends, every rank ends with it: with one line, and with one exit status.
"""

import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple, NoReturn

from transformers.utils import logging as transformers_logging

from arguments.flag_table import flags_of_all_ranks
from arguments.parser import refuse
from arguments.settings import NetworkSettings, Settings
from comm.communicator import PeerLostError
from comm.lifecycle.exit import report_line
from comm.lifecycle.stop_signals import (
    CLOSING,
    LOADING,
    STOPPED,
    StopAskedError,
    StopListener,
    StopRequest,
)
from comm.liveness.failure_policy import ExitPolicy
from comm.process_groups import create_process_groups
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.interface import choose_interface
from comm.rendezvous.job_key import JobKey, is_readable_by_others, read_job_key
from comm.rendezvous.join import Rendezvous, join
from comm.run_context import RunContext
from comm.topology import Topology
from common.text import one_line
from monitor.console import Console
from planning.cluster.check import check_cluster
from training.device import choose_backends, choose_device
from training.iteration import TrainingStoppedError
from training.run import train
from training.startup_checks import LocalResources

logger = logging.getLogger(__name__)


class End(NamedTuple):
    """The exit status of a run that ended by itself, and a line that says why."""

    status: int
    line: str | None = None


def run_session(
    settings: Settings,
    resources: LocalResources,
    console: Console,
    stop: StopRequest,
    listener: StopListener,
) -> None:
    """Runs this rank among all ranks and ends the process if the run did not complete."""
    parallel = settings.parallel
    rank = parallel.rank
    topology = Topology(rank, parallel.pipeline_group_size, parallel.data_group_size)
    rendezvous = meet(settings, resources, stop)
    try:
        policy = ExitPolicy.connect(rendezvous, topology, stop=stop)
    except (TimeoutError, ConnectionError) as error:
        sys.stderr.write(f"rank {rank}: {one_line(error)}\n")
        sys.exit(1)
    listener.hand_over(end=policy.fail, forward=policy.detector.forward_stop)
    stop.phase = LOADING
    closing = ExitStack()  # closes what may take a minute, after the other ranks know of a failure
    try:
        if resources.problem is not None:
            raise resources.problem
        settings, context = _connect(settings, topology, rendezvous, policy)
        if settings.output.check_cluster:
            end = End(check_cluster(settings, context, rendezvous))
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
        report_line(end.line if parallel.world_size == 1 else f"rank {rank}: {end.line}")
    if end.status:
        sys.exit(end.status)


def meet(settings: Settings, resources: LocalResources, stop: StopRequest) -> Rendezvous:
    """Meets the other ranks, also to report a problem; a world of one opens no socket."""
    network, parallel = settings.network, settings.parallel
    if parallel.world_size == 1:
        return Rendezvous.alone()
    try:
        key = _job_key(network)
    except ValueError as error:
        refuse(error)  # without a key this rank cannot talk to the others
    try:
        interface = resources.interface
        if interface is None:  # --net-interface is wrong, and this rank must report it
            host, _ = parse_dist_url(network.dist_url)
            interface = choose_interface(flag=None, master_host=host, environ={})
        return join(
            url=network.dist_url,
            rank=parallel.rank,
            world_size=parallel.world_size,
            interface=interface,
            facts=flags_of_all_ranks(settings),
            key=key,
            start=network.start_id,
            join_timeout=network.join_timeout,
            host=False if network.agent_store else None,
            stop=stop,
        )
    except ValueError as error:
        refuse(resources.problem or error)
    except StopAskedError as error:
        report_line(f"rank {parallel.rank}: {error}")
        sys.exit(STOPPED)
    except (TimeoutError, ConnectionError) as error:
        sys.stderr.write(f"rank {parallel.rank}: {one_line(error)}\n")
        sys.exit(1)


def _job_key(network: NetworkSettings) -> JobKey:
    path = network.job_token_file
    key = read_job_key(network.job_id, path)
    if path is not None and is_readable_by_others(path):
        logger.warning("--job-token-file %s: other users may read it: `chmod 600` it", path)
    return key


def _connect(
    settings: Settings, topology: Topology, rendezvous: Rendezvous, policy: ExitPolicy
) -> tuple[Settings, RunContext]:
    """Chooses the device and connects the ranks; the settings then name the backends."""
    transformers_logging.set_verbosity_error()
    device = choose_device(settings.parallel, ranks_here=len(rendezvous.ranks_on_this_host))
    dist_backend, dp_backend = choose_backends(settings.parallel, device)
    groups = create_process_groups(
        topology,
        rendezvous,
        dist_backend=dist_backend,
        dp_backend=dp_backend,
        device=device,
        dist_timeout=settings.network.dist_timeout,
        policy=policy,
    )
    context = RunContext(topology, groups, device, rendezvous.nonce)
    return settings.changed(dist_backend=dist_backend, dp_backend=dp_backend), context


def _fail_with_traceback(
    policy: ExitPolicy, error: Exception, *, before_exit: Callable[[], object]
) -> NoReturn:
    """Ends the run after an unforeseen error: a traceback here, one line on the other ranks."""
    traceback.print_exc()
    causes = [error, error.__cause__] if error.__cause__ is not None else [error]
    line = ": ".join(f"{type(cause).__name__}: {one_line(cause)}" for cause in causes)
    policy.fail(1, line, before_exit=before_exit)
