"""The text of --check-cluster: tables of the ranks and links, and advice."""

from collections.abc import Iterator, Mapping, Sequence

from comm.rendezvous.participants import Participant
from comm.topology import Topology
from common.text import format_bytes, format_table
from common.text import format_seconds as _time
from planning.cluster.estimate import Estimate, RunShape
from planning.cluster.link_probe import Link, LinkSpeed
from planning.cluster.machines import MachineFacts

# The report has a line or a remedy above these limits:
SLOWED = 1.1  # time of an iteration / time with free links
UNEVEN = 1.05  # time of the slowest stage / its time with the best split
UNLIKE = 1.5  # rate of the fastest device / rate of the slowest device
SKEWED = 1.0  # seconds between two clocks
EXCHANGED = 0.2  # time of the gradients' exchange / time of an update's iterations


def rank_table(
    topology: Topology,
    participants: Sequence[Participant],
    machines: Sequence[MachineFacts],
    clocks: Sequence[Sequence[float]],
    rates: Sequence[float],
    plan: RunShape | None,
) -> str:
    """Returns a table with a line for each rank.

    `clocks` has two numbers for each rank: the seconds that the rank's clock is ahead of rank 0's
    clock, and the largest error of this measurement in seconds.
    """
    rows = [["rank", "stage", "replica", "host", "interface", "device", "clock", "matmul"]]
    if plan is not None:
        rows[0].append("layers")
    ranks = zip(participants, machines, clocks, rates, strict=True)
    for participant, machine, (ahead, error), rate in ranks:
        rank, interface = participant.rank, participant.interface
        replica, stage = divmod(rank, topology.num_stages)
        clock = f"{1e3 * ahead:+.2f} ms +- {1e3 * error:.2f}" if rank else "0"
        place = f"{interface} ({participant.address})" if interface else "none"
        row = [*map(str, (rank, stage, replica)), participant.host, place, machine.device, clock]
        rows.append([*row, f"{2e-9 * rate:.4g} GFLOP/s"])
        if plan is not None:
            rows[-1].append(f"{rate / (plan.work.block * plan.tokens):.4g} forwards/s")
    return format_table(rows)


def link_table(
    participants: Sequence[Participant], links: Mapping[Link, LinkSpeed], wanted: Mapping[Link, int]
) -> str:
    """Returns a table with a line for each link; `wanted` maps links to the bytes of a message."""
    rows = [["link", "of", "latency", "message", "takes", "rate"]]
    for link, speed in links.items():
        ends, size = _ends(participants, link), wanted[link]
        takes = _time(speed.message_seconds(size))
        if size != speed.nbytes:
            takes += f" (by {format_bytes(speed.nbytes)})"
        latency = _time(speed.latency)
        rows.append([ends, link.group, latency, format_bytes(size), takes, _rate(speed)])
    return format_table(rows)


def advice(
    estimate: Estimate | None, participants: Sequence[Participant], *, precision: str
) -> Iterator[str]:
    """Yields lines with the expected times of a run, and with remedies for long times."""
    if estimate is None:
        yield "no rank has a config.json that matches the flags, so no step time is estimated"
        return
    plan = estimate.plan
    yield (
        f"an iteration ({plan.num_microbatches} microbatches per pipeline, {plan.schedule}, "
        f"--num-layers {plan.layers}) takes at least {_time(estimate.iteration)} for matmuls and "
        f"messages; with free links {_time(estimate.iteration_with_free_links)}"
    )
    if estimate.slowest_link is not None:
        yield _about_slowest(estimate, estimate.slowest_link, participants, precision)
    yield from _about_replicas(estimate, participants)
    yield from _about_devices(participants, estimate.rates)
    if estimate.topology.num_stages > 1:
        yield _about_split(plan, estimate)


def about_clocks(
    participants: Sequence[Participant], clocks: Sequence[Sequence[float]]
) -> Iterator[str]:
    """Yields a line for each clock that differs from rank 0's clock by more than SKEWED seconds."""
    for participant, (ahead, error) in zip(participants, clocks, strict=True):
        if abs(ahead) - error > SKEWED:
            yield (
                f"the clock of rank {participant.rank} (host {participant.host}) is "
                f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} rank 0's: do not "
                "compare times in logs and of files"
            )


def _about_slowest(
    estimate: Estimate, link: Link, participants: Sequence[Participant], precision: str
) -> str:
    num_stages, speed, plan = estimate.topology.num_stages, estimate.links[link], estimate.plan
    source, to = link.source % num_stages, link.to % num_stages
    kind = "gradients" if to < source else "activations"
    ratio = estimate.iteration / estimate.iteration_with_free_links
    description = (
        f"the pipelines' slowest link is stage {source} -> stage {to} of pipeline "
        f"{link.source // num_stages} ({_ends(participants, link)}): {_rate(speed)}, latency "
        f"{_time(speed.latency)}; the {format_bytes(plan.message)} of each microbatch's {kind} "
        f"take {_time(estimate.message_seconds(link))} there, while stage {to} computes "
        f"{_time(estimate.compute_seconds(link))} on them: "
    )
    if ratio < SLOWED:
        return f"{description}the links make an iteration {ratio - 1:.0%} longer"
    remedies = []
    if precision == "fp32":
        remedies.append("--bf16 or --fp16 halves the messages")
    if speed.latency > speed.message_seconds(plan.message) / 2:
        remedies.append("a larger --micro-batch-size makes fewer messages")
    if participants[link.source].host != participants[link.to].host:
        remedies.append("both stages on one machine, or a faster link between them, would help")
    remedy = "; ".join(remedies) or "a faster connection between the two stages would help"
    return f"{description}expect iterations {ratio:.1f} times as long as with free links; {remedy}"


def _about_replicas(estimate: Estimate, participants: Sequence[Participant]) -> Iterator[str]:
    """Yields a line about the stage whose replicas take longest to sum their gradients."""
    stages = range(estimate.topology.num_stages)
    exchanges = [(exchange, stage) for stage in stages if (exchange := estimate.exchange(stage))]
    if not exchanges:
        return
    (seconds, link), stage = max(exchanges)
    update = estimate.plan.accumulate * estimate.iteration
    size = format_bytes(estimate.plan.gradient_bytes(stage))
    line = (
        f"at each update the replicas of stage {stage} exchange {size} of gradients, which takes "
        f"about {_time(seconds)} ({_ends(participants, link)}: {_rate(estimate.links[link])}) "
        f"beside {_time(update)} of computing and messages"
    )
    if seconds > EXCHANGED * update:
        line += "; a larger --gradient-accumulate-step or --batch-size exchanges them less often"
    yield line


def _about_devices(participants: Sequence[Participant], rates: Sequence[float]) -> Iterator[str]:
    slow, fast = rates.index(min(rates)), rates.index(max(rates))
    if rates[fast] > UNLIKE * rates[slow]:
        ends = (f"{2e-9 * rates[r]:.3g} GFLOP/s on {_end(participants[r])}" for r in (slow, fast))
        yield "devices differ: {}, but {}; replicas of a stage wait for the slowest".format(*ends)


def _about_split(plan: RunShape, estimate: Estimate) -> str:
    best = estimate.balanced_layers()
    now, then = estimate.stage_seconds(plan.layers), estimate.stage_seconds(best)
    devices = "for devices as fast as measured"
    if now < UNEVEN * then:
        return f"--num-layers {plan.layers} is even enough {devices}"
    return (
        f"{devices}, --num-layers {best} is more even than {plan.layers}: its slowest stage takes "
        f"{_time(then)} for the forward of a microbatch instead of {_time(now)} (a run that "
        "resumes keeps its split)"
    )


def _ends(participants: Sequence[Participant], link: Link) -> str:
    return f"{_end(participants[link.source])} -> {_end(participants[link.to])}"


def _end(participant: Participant) -> str:
    return f"rank {participant.rank} ({participant.host})"


def _rate(speed: LinkSpeed) -> str:
    return f"{format_bytes(round(speed.bytes_per_second))}/s"
