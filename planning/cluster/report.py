"""--check-cluster in words: tables of the ranks and links, and advice."""

from collections.abc import Iterator, Mapping, Sequence

from comm.rendezvous.participants import Participant
from comm.topology import Topology
from common.text import format_bytes, format_table
from pipeline_parallel.partition.split import Split
from planning.cluster.estimate import Estimate, RunShape
from planning.cluster.link_probe import LinkSpeed
from planning.cluster.links import Link
from planning.cluster.machines import MachineFacts

SLOWED = 1.1  # links that make steps so many times as long are worth a word
UNEVEN = 1.05  # and so is a split whose slowest stage takes so many times as long as need be
UNLIKE = 1.5  # as are devices of which one is so many times as fast as another
SKEWED = 1.0  # seconds between two clocks that confuse who reads logs
EXCHANGED = 0.2  # of an update's computing, spent on the replicas' gradients


def rank_table(
    topology: Topology,
    participants: Sequence[Participant],
    machines: Sequence[MachineFacts],
    clocks: Sequence[tuple[float, float]],
    rates: Sequence[float],
    plan: RunShape | None,
) -> str:
    """A line for each rank. clocks: seconds ahead of rank 0's, and how far that may be off."""
    rows = [["rank", "stage", "replica", "host", "interface", "device", "clock", "products"]]
    if plan is not None:
        rows[0].append("layers")
    for participant, machine, (ahead, error), rate in zip(
        participants, machines, clocks, rates, strict=True
    ):
        rank = participant.rank
        place = [rank % topology.num_stages, rank // topology.num_stages]
        rows.append(
            [
                str(rank),
                *map(str, place),
                participant.host,
                _place(participant),
                machine.device,
                f"{1e3 * ahead:+.2f} ms +- {1e3 * error:.2f}" if rank else "0",
                f"{2e-9 * rate:.4g} GFLOP/s",
            ]
        )
        if plan is not None:
            rows[-1].append(f"{rate / (plan.work.block * plan.tokens):.4g} forwards/s")
    return format_table(rows)


def link_table(
    participants: Sequence[Participant], links: Mapping[Link, LinkSpeed], wanted: Mapping[Link, int]
) -> str:
    """A line for each link; `wanted` is the size of its messages in a run."""
    rows = [["link", "of", "latency", "message", "takes", "rate"]]
    for link, speed in links.items():
        size, seconds = wanted[link], speed.message_seconds(wanted[link])
        measured = format_bytes(speed.nbytes)
        rows.append(
            [
                _ends(participants, link),
                link.group,
                _time(speed.latency),
                format_bytes(size),
                _time(seconds) + ("" if size == speed.nbytes else f" (by {measured})"),
                _rate(speed),
            ]
        )
    return format_table(rows)


def advice(
    topology: Topology,
    participants: Sequence[Participant],
    plan: RunShape,
    links: Mapping[Link, LinkSpeed],
    rates: Sequence[float],
    estimate: Estimate,
    *,
    precision: str,
) -> Iterator[str]:
    """What to expect, and what would help, in a line each."""
    free = estimate.iteration_with_free_links
    yield (
        f"an iteration ({plan.num_microbatches} microbatches per pipeline, {plan.schedule}, "
        f"--num-layers {plan.layers}) takes at least {_time(estimate.iteration)} of products and "
        f"messages; with links that cost nothing {_time(free)}"
    )
    if estimate.slowest_link is not None:
        yield _about_slowest(topology, participants, plan, links, estimate, precision)
    yield from _about_replicas(topology, participants, plan, links, estimate)
    yield from _about_devices(participants, rates)
    if topology.num_stages > 1:
        yield _about_split(plan, estimate)


def about_clocks(
    participants: Sequence[Participant], clocks: Sequence[tuple[float, float]]
) -> Iterator[str]:
    for participant, (ahead, error) in zip(participants, clocks, strict=True):
        if abs(ahead) - error > SKEWED:
            yield (
                f"the clock of rank {participant.rank} (host {participant.host}) is "
                f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} rank 0's: times in "
                "logs and of files do not compare"
            )


def _about_slowest(
    topology: Topology,
    participants: Sequence[Participant],
    plan: RunShape,
    links: Mapping[Link, LinkSpeed],
    estimate: Estimate,
    precision: str,
) -> str:
    link = estimate.slowest_link
    assert link is not None
    source, to = link.source % topology.num_stages, link.to % topology.num_stages
    kind = "gradients" if to < source else "activations"
    ratio = estimate.iteration / estimate.iteration_with_free_links
    told = (
        f"the pipelines' slowest link is stage {source} -> stage {to} of pipeline "
        f"{link.source // topology.num_stages} ({_ends(participants, link)}): "
        f"{_rate(links[link])}, latency {_time(links[link].latency)}; the "
        f"{format_bytes(plan.message)} of each "
        f"microbatch's {kind} take {_time(estimate.message_seconds(link))} there, while stage {to} "
        f"computes {_time(estimate.compute_seconds(link))} on them: "
    )
    if ratio < SLOWED:
        return f"{told}the links make an iteration {ratio - 1:.0%} longer"
    help_ = _remedies(participants, link, links[link], plan, precision)
    return f"{told}expect iterations {ratio:.1f} times as long as with free links; {help_}"


def _remedies(
    participants: Sequence[Participant],
    link: Link,
    speed: LinkSpeed,
    plan: RunShape,
    precision: str,
) -> str:
    found = []
    if precision == "fp32":
        found.append("--bf16 or --fp16 halves the messages")
    if speed.latency > speed.message_seconds(plan.message) / 2:
        found.append("a larger --micro-batch-size makes fewer of them")
    if participants[link.source].host != participants[link.to].host:
        found.append("both stages on one machine, or a faster link between them, would help")
    return "; ".join(found) or "a faster channel between the two would help"


def _about_replicas(
    topology: Topology,
    participants: Sequence[Participant],
    plan: RunShape,
    links: Mapping[Link, LinkSpeed],
    estimate: Estimate,
) -> Iterator[str]:
    """Of the stage whose replicas take longest to sum their gradients."""
    found = [(estimate.exchange(stage), stage) for stage in range(topology.num_stages)]
    timed = [(exchange, stage) for exchange, stage in found if exchange is not None]
    if not timed:
        return
    (seconds, link), stage = max(timed)
    update = plan.accumulate * estimate.iteration
    size = format_bytes(plan.gradient_bytes(stage))
    told = (
        f"at each update the replicas of stage {stage} exchange {size} of gradients, which takes "
        f"about {_time(seconds)} ({_ends(participants, link)}: "
        f"{_rate(links[link])}) beside {_time(update)} of computing and messages"
    )
    if seconds > EXCHANGED * update:
        told += "; a larger --gradient-accumulate-step or --batch-size exchanges them less often"
    yield told


def _about_devices(participants: Sequence[Participant], rates: Sequence[float]) -> Iterator[str]:
    slow, fast = rates.index(min(rates)), rates.index(max(rates))
    if rates[fast] > UNLIKE * rates[slow]:
        ends = (f"{2e-9 * rates[r]:.3g} GFLOP/s on {_end(participants[r])}" for r in (slow, fast))
        yield "devices differ: {}, but {}; replicas of a stage wait for the slowest".format(*ends)


def _about_split(plan: RunShape, estimate: Estimate) -> str:
    best: Split = estimate.balanced_layers()
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


def _place(participant: Participant) -> str:
    return f"{participant.interface} ({participant.address})" if participant.interface else "none"


def _rate(speed: LinkSpeed) -> str:
    return f"{format_bytes(round(speed.bytes_per_second))}/s"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
