"""--check-cluster: the ranks compare their machines and measure devices and links."""

import logging
import time
from collections.abc import Mapping, Sequence

import torch

from arguments.settings import Settings
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.process_groups import ProcessGroups
from comm.rendezvous.join import Rendezvous
from comm.run_context import RunContext
from comm.topology import Topology
from data_parallel.grad_buffer import BUCKET_BYTES
from modules.matmul.cpu_info import CpuInfo
from modules.matmul.select import select_matmul
from monitor.profiling.clock_sync import clock_offset
from planning.cluster.estimate import Estimate, RunShape, activation_bytes, make_run_shape
from planning.cluster.link_probe import Link, LinkSpeed, answer, links, probe
from planning.cluster.machines import MachineFacts, collect_machine_facts, differences
from planning.cluster.matmul_rate import block_rate
from planning.cluster.report import about_clocks, advice, link_table, rank_table

logger = logging.getLogger(__name__)

_LINK_SECONDS = 1.0  # per direction of each link, one link after another
_MATMUL_SECONDS = 1.0  # all devices measure at once, as in training


def check_cluster(settings: Settings, context: RunContext, rendezvous: Rendezvous) -> int:
    """Compares machines and measures devices and links; all ranks call it, and rank 0 logs results.

    Returns:
        The exit status: 0, or 1 if ranks differ or something is missing on a rank.

    Raises:
        PeerLostError: a rank does not answer.
    """
    topology, control, device = context.topology, context.control, context.device
    if not context.is_cuda:
        select_matmul(settings.precision.cpu_matmul, CpuInfo.of_this_machine(), saved=None)
    facts = collect_machine_facts(settings, topology, device)
    machines = [MachineFacts.from_json(values) for values in gather_json(control, facts)]
    sizes = next((machine.model for machine in machines if machine.model is not None), None)
    offset = clock_offset(control, clock=time.time_ns)
    clocks = gather_json(control, [-offset.offset / 1e9, offset.error / 1e9])
    rates = gather_json(control, block_rate(settings, sizes, device, budget=_MATMUL_SECONDS))
    plan = None if sizes is None else make_run_shape(settings, sizes)
    wanted = {link: _message_bytes(settings, topology, link, plan) for link in links(topology)}
    dist_timeout = settings.network.dist_timeout
    speeds = measure_links(topology, context.groups, wanted, device, dist_timeout=dist_timeout)
    participants = rendezvous.participants
    problems = differences(participants, machines)
    if context.rank == 0:
        logger.info("%s", rank_table(topology, participants, machines, clocks, rates, plan))
        if speeds:
            logger.info("%s", link_table(participants, speeds, wanted))
        logger.info("- versions: %s", ", ".join(map(" ".join, machines[0].versions.items())))
        estimate = None if plan is None else Estimate(plan, topology, rates, speeds)
        precision = settings.precision.precision
        for line in about_clocks(participants, clocks):
            logger.info("- %s", line)
        for line in advice(estimate, participants, precision=precision):
            logger.info("- %s", line)
        _log_verdict(problems)
    return 1 if problems else 0


def measure_links(
    topology: Topology,
    groups: ProcessGroups,
    wanted: Mapping[Link, int],
    device: torch.device,
    *,
    dist_timeout: float,
) -> dict[Link, LinkSpeed]:
    """Measures the links of the run one after another; every rank calls it.

    Args:
        wanted: for each link, the size in bytes of a message that the run sends over it.
        dist_timeout: the timeout of a waiting rank, in seconds.
    """
    budget = min(_LINK_SECONDS, dist_timeout / 4)
    if wanted and topology.rank == 0:
        logger.info(
            "measuring %d links one after another; this takes at most about %g s",
            len(wanted),
            len(wanted) * budget,
        )
    measured: list[list[float]] = []
    for number, (link, nbytes) in enumerate(wanted.items()):
        gather_json(groups.control, number)  # waits until the previous link is measured
        if link.group == "pipeline":
            group: Communicator = groups.pipeline
            source, to = link.source % topology.num_stages, link.to % topology.num_stages
        else:
            group = groups.replicas
            source, to = link.source // topology.num_stages, link.to // topology.num_stages
        if topology.rank == link.source:
            speed = probe(group, to=to, nbytes=nbytes, device=device, budget=budget)
            measured.append([number, *speed])
        elif topology.rank == link.to:
            answer(group, source=source, device=device)
    gathered = [line for of_rank in gather_json(groups.control, measured) for line in of_rank]
    todo = list(wanted)
    return {todo[number]: LinkSpeed(*speed) for number, *speed in sorted(gathered)}


def _message_bytes(
    settings: Settings, topology: Topology, link: Link, plan: RunShape | None
) -> int:
    """Returns the size in bytes of one message on a link.

    Between stages, a message is the activations or gradients of a microbatch. Between replicas, a
    message is a bucket of gradients, or all gradients of a stage if they are smaller than a bucket.
    """
    if link.group == "pipeline":
        return activation_bytes(settings)
    if plan is None:
        return BUCKET_BYTES
    return min(BUCKET_BYTES, plan.gradient_bytes(link.source % topology.num_stages))


def _log_verdict(problems: Sequence[str]) -> None:
    if not problems:
        logger.info("check passed: all ranks agree, and no checked item is missing")
        return
    for line in problems:
        logger.info("- %s", line)
    logger.info("check failed: differences and missing items, listed above: %d", len(problems))
