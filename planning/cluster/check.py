"""--check-cluster: the ranks meet as for a run, compare what they have, and measure."""

import logging
import time
from collections.abc import Sequence

import torch

from arguments.settings import Settings
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.process_groups import ProcessGroups
from comm.rendezvous.join import Rendezvous
from comm.run_context import RunContext
from comm.topology import Topology
from common.tensors import DTYPES
from data_parallel.grad_buffer import BUCKET_BYTES
from modules.matmul.cpu_info import CpuInfo
from modules.matmul.select import select_matmul
from modules.model_sizes import ModelSizes
from monitor.profiling.clock_sync import clock_offset
from pipeline_parallel.partition.balance import choose_split
from planning.cluster.estimate import Estimate, RunShape
from planning.cluster.link_probe import LinkSpeed, answer, probe
from planning.cluster.links import Link, links
from planning.cluster.machines import MachineFacts, collect_machine_facts, differences, from_json
from planning.cluster.matmul_rate import matmul_rate
from planning.cluster.report import about_clocks, advice, link_table, rank_table

logger = logging.getLogger(__name__)

_LINK_SECONDS = 1.0  # each direction of each link, one after the other
_PRODUCT_SECONDS = 1.0  # all devices at once, as in training


def check_cluster(settings: Settings, context: RunContext, rendezvous: Rendezvous) -> int:
    """Compares machines and measures devices and links; every rank calls it, rank 0 logs.

    Returns:
        The exit status: 0, or 1 if ranks differ or lack something.

    Raises:
        PeerLostError: a rank does not answer.
    """
    topology, control, device = context.topology, context.control, context.device
    if not context.is_cuda:
        select_matmul(settings.precision.cpu_matmul, CpuInfo.of_this_machine(), saved=None)
    facts = collect_machine_facts(settings, topology, device)
    machines = [from_json(one) for one in gather_json(control, facts)]
    sizes = next((one.model for one in machines if one.model is not None), None)
    clocks = _clocks(control)
    rates = gather_json(control, _rate(settings, sizes, device))
    message = (
        settings.update.micro_batch_size
        * settings.update.seq_length
        * settings.model.embedding_dim
        * DTYPES[settings.precision.precision].itemsize
    )
    shape = None if sizes is None else make_plan(settings, sizes, message)
    wanted = {link: _message_bytes(topology, link, message, shape) for link in links(topology)}
    speeds = measure_links(
        topology, context.groups, wanted, device, dist_timeout=settings.network.dist_timeout
    )
    found = differences(rendezvous.participants, machines)
    if context.rank == 0:
        _log(settings, topology, rendezvous, machines, clocks, rates, speeds, wanted, shape)
        _log_verdict(found)
    return 1 if found else 0


def measure_links(
    topology: Topology,
    groups: ProcessGroups,
    wanted: dict[Link, int],
    device: torch.device,
    *,
    dist_timeout: float,
) -> dict[Link, LinkSpeed]:
    """Every link of the run, alone: all other ranks wait meanwhile. Every rank calls it.

    wanted: the bytes of a message of each link.
    """
    budget = min(_LINK_SECONDS, dist_timeout / 4)
    todo = list(wanted)
    if todo and topology.rank == 0:
        logger.info(
            "measuring %d links one after the other, for some %g s at most",
            len(todo),
            len(todo) * budget,
        )
    mine: list[tuple[int, LinkSpeed]] = []
    for number, link in enumerate(todo):
        gather_json(groups.control, number)  # the link before is done
        group = groups.pipeline if link.group == "pipeline" else groups.replicas
        peers = _indices(topology, link)
        if topology.rank == link.source:
            speed = probe(group, to=peers[1], nbytes=wanted[link], device=device, budget=budget)
            mine.append((number, speed))
        elif topology.rank == link.to:
            answer(group, source=peers[0], device=device)
    told = [(n, s.latency, s.nbytes, s.seconds) for n, s in mine]
    every = [one for of_rank in gather_json(groups.control, told) for one in of_rank]
    return {todo[number]: LinkSpeed(*numbers) for number, *numbers in sorted(every)}


def make_plan(settings: Settings, sizes: ModelSizes, message: int) -> RunShape | None:
    """What the flags make of a model; None where it cannot be split so, which is told elsewhere."""
    work = sizes.work(settings.update.seq_length)
    try:
        layers = choose_split(
            settings.model.num_layers,
            work,
            num_stages=settings.parallel.pipeline_group_size,
            model_layers=sizes.layers,
        )
    except ValueError:
        return None
    return RunShape(
        model=sizes,
        work=work,
        layers=layers,
        schedule=settings.parallel.pp_mode,
        recompute=settings.precision.recompute,
        num_microbatches=settings.update.num_microbatches,
        accumulate=settings.update.gradient_accumulate_step,
        tokens=settings.update.micro_batch_size * settings.update.seq_length,
        message=message,
    )


def _message_bytes(topology: Topology, link: Link, message: int, plan: RunShape | None) -> int:
    """A microbatch's activations, or a bucket of gradients: of few, all that the stage has."""
    if link.group == "pipeline":
        return message
    if plan is None:
        return BUCKET_BYTES
    return min(BUCKET_BYTES, plan.gradient_bytes(link.source % topology.num_stages))


def _indices(topology: Topology, link: Link) -> tuple[int, int]:
    """The two ends in their group."""
    ends = (link.source, link.to)
    if link.group == "pipeline":
        return ends[0] % topology.num_stages, ends[1] % topology.num_stages
    return ends[0] // topology.num_stages, ends[1] // topology.num_stages


def _rate(settings: Settings, sizes: ModelSizes | None, device: torch.device) -> float:
    """Multiply-adds per second of this rank's device, of the largest product of a block."""
    hidden = settings.model.embedding_dim if sizes is None else sizes.hidden
    return matmul_rate(
        rows=settings.update.micro_batch_size * settings.update.seq_length,
        inputs=hidden,
        outputs=4 * hidden if sizes is None else sizes.inner,
        dtype=DTYPES[settings.precision.precision],
        device=device,
        budget=_PRODUCT_SECONDS,
    )


def _clocks(control: Communicator) -> list[tuple[float, float]]:
    """By rank, the seconds that its clock is ahead of rank 0's, and how far that may be off."""
    mine = clock_offset(control, clock=time.time_ns)
    found = gather_json(control, [-mine.offset / 1e9, mine.error / 1e9])
    return [(ahead, error) for ahead, error in found]


def _log(
    settings: Settings,
    topology: Topology,
    rendezvous: Rendezvous,
    machines: Sequence[MachineFacts],
    clocks: Sequence[tuple[float, float]],
    rates: Sequence[float],
    speeds: dict[Link, LinkSpeed],
    wanted: dict[Link, int],
    plan: RunShape | None,
) -> None:
    participants = rendezvous.participants
    logger.info("%s", rank_table(topology, participants, machines, clocks, rates, plan))
    if speeds:
        logger.info("%s", link_table(participants, speeds, wanted))
    logger.info("- versions: %s", ", ".join(map(" ".join, machines[0].versions.items())))
    for line in about_clocks(participants, clocks):
        logger.info("- %s", line)
    if plan is None:
        logger.info("- no rank has a config.json that fits with the flags: no step is estimated")
        return
    estimate = Estimate(plan, topology, rates=rates, links=speeds)
    for line in advice(
        topology,
        participants,
        plan,
        speeds,
        rates,
        estimate,
        precision=settings.precision.precision,
    ):
        logger.info("- %s", line)


def _log_verdict(found: Sequence[str]) -> None:
    if not found:
        logger.info("check passed: all ranks agree, and nothing that was looked at is missing")
    for line in found:
        logger.info("- %s", line)
    if found:
        logger.info("check failed: differing or missing, told above: %d", len(found))
