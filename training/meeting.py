"""The rendezvous of all ranks. After the rendezvous, all ranks learn at once if a rank fails.

The rendezvous needs no model and no data, so the large libraries are imported later.
"""

import logging
import sys
from typing import NamedTuple

from arguments.flag_table import flags_of_all_ranks
from arguments.parser import refuse
from arguments.settings import NetworkSettings, Settings
from comm.lifecycle.exit import report_line
from comm.lifecycle.stop_signals import (
    LOADING,
    STOPPED,
    StopAskedError,
    StopListener,
    StopRequest,
)
from comm.liveness.failure_policy import ExitPolicy
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.interface import choose_interface
from comm.rendezvous.job_key import JobKey, is_readable_by_others, read_job_key
from comm.rendezvous.join import Rendezvous, join
from comm.timing import DEFAULT_TIMING, Timing
from comm.topology import Topology
from common.text import one_line
from training.startup_checks import LocalResources

logger = logging.getLogger(__name__)


class Meeting(NamedTuple):
    """The result of the rendezvous: the participants, the topology and the failure policy."""

    rendezvous: Rendezvous
    topology: Topology
    policy: ExitPolicy


def meet(
    settings: Settings,
    resources: LocalResources,
    stop: StopRequest,
    listener: StopListener,
    timing: Timing = DEFAULT_TIMING,
) -> Meeting:
    """Joins the rendezvous of all ranks; ends the process if the rendezvous fails.

    A rank with a problem in `resources` joins too, to report the problem to the other ranks. After
    the rendezvous, a request to stop reaches all ranks. A run of one process opens no socket.
    """
    parallel = settings.parallel
    topology = Topology(parallel.rank, parallel.pipeline_group_size, parallel.data_group_size)
    try:
        rendezvous = _join(settings, resources, stop, timing)
        policy = ExitPolicy.connect(rendezvous, topology, stop=stop, timing=timing)
    except ValueError as error:
        refuse(resources.problem or error)
    except StopAskedError as error:
        report_line(f"rank {parallel.rank}: {error}")
        sys.exit(STOPPED)
    except (TimeoutError, ConnectionError) as error:
        sys.stderr.write(f"rank {parallel.rank}: {one_line(error)}\n")
        sys.exit(1)
    listener.hand_over(end=policy.fail, forward=policy.detector.forward_stop)
    stop.phase = LOADING
    return Meeting(rendezvous, topology, policy)


def _join(
    settings: Settings, resources: LocalResources, stop: StopRequest, timing: Timing
) -> Rendezvous:
    network, parallel = settings.network, settings.parallel
    if parallel.world_size == 1:
        return Rendezvous.alone()
    try:
        key = _job_key(network)
    except ValueError as error:
        refuse(error)  # without a key this rank cannot talk to the others
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
        timing=timing,
    )


def _job_key(network: NetworkSettings) -> JobKey:
    path = network.job_token_file
    key = read_job_key(network.job_id, path)
    if path is not None and is_readable_by_others(path):
        logger.warning("--job-token-file %s: other users can read it; run `chmod 600` on it", path)
    return key
