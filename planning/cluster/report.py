"""--check-cluster in words: tables of the ranks and links, and advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from comm.rendezvous.participants import Participant
from comm.topology import Topology
from common.text import format_table
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
    roster: Sequence[Participant],
    machines: Sequence[MachineFacts],
    clocks: Sequence[tuple[float, float]],
    rates: Sequence[float],
    plan: RunShape | None,
) -> str:
    """A line for each rank. clocks: seconds ahead of rank 0's, and how far that may be off."""
    rows = [["rank", "stage", "replica", "host", "interface", "device", "clock", "products"]]
    if plan is not None:
        rows[0].append("layers")
    for arrival, machine, (ahead, error), rate in zip(roster, machines, clocks, rates, strict=True):
        rank = arrival.rank
        place = [rank % topology.num_stages, rank // topology.num_stages]
        rows.append(
            [
                str(rank),
                *map(str, place),
                arrival.host,
                _place(arrival),
                machine.device,
                f"{1e3 * ahead:+.2f} ms +- {1e3 * error:.2f}" if rank else "0",
                f"{2e-9 * rate:.4g} GFLOP/s",
            ]
        )
        if plan is not None:
            rows[-1].append(f"{rate / (plan.work.block * plan.tokens):.4g} forwards/s")
    return format_table(rows)


def link_table(
    roster: Sequence[Participant], links: Mapping[Link, LinkSpeed], wanted: Mapping[Link, int]
) -> str:
    """A line for each link; `wanted` is the size of its messages in a run."""
    rows = [["link", "of", "latency", "message", "takes", "rate"]]
    for link, speed in links.items():
        size, seconds = wanted[link], speed.message_seconds(wanted[link])
        rows.append(
            [
                _ends(roster, link),
                link.group,
                _time(speed.latency),
                _size(size),
                _time(seconds) + ("" if size == speed.nbytes else f" (by {_size(speed.nbytes)})"),
                _rate(speed),
            ]
        )
    return format_table(rows)


def advice(
    topology: Topology,
    roster: Sequence[Participant],
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
        yield _about_slowest(topology, roster, plan, links, estimate, precision)
    yield from _about_replicas(topology, roster, plan, links, estimate)
    yield from _about_devices(roster, rates)
    if topology.num_stages > 1:
        yield _about_split(plan, estimate)


def about_clocks(
    roster: Sequence[Participant], clocks: Sequence[tuple[float, float]]
) -> Iterator[str]:
    for arrival, (ahead, error) in zip(roster, clocks, strict=True):
        if abs(ahead) - error > SKEWED:
            yield (
                f"the clock of rank {arrival.rank} (host {arrival.host}) is {abs(ahead):.1f} s "
                f"{'ahead of' if ahead > 0 else 'behind'} rank 0's: times in logs and of files do "
                "not compare"
            )


def _about_slowest(
    topology: Topology,
    roster: Sequence[Participant],
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
        f"{link.source // topology.num_stages} ({_ends(roster, link)}): {_rate(links[link])}, "
        f"latency {_time(links[link].latency)}; the {_size(plan.message)} of each microbatch's "
        f"{kind} take {_time(estimate.message_seconds(link))} there, while stage {to} computes "
        f"{_time(estimate.compute_seconds(link))} on them: "
    )
    if ratio < SLOWED:
        return f"{told}the links make an iteration {ratio - 1:.0%} longer"
    help_ = _remedies(roster, link, links[link], plan, precision)
    return f"{told}expect iterations {ratio:.1f} times as long as with free links; {help_}"


def _remedies(
    roster: Sequence[Participant], link: Link, speed: LinkSpeed, plan: RunShape, precision: str
) -> str:
    found = []
    if precision == "fp32":
        found.append("--bf16 or --fp16 halves the messages")
    if speed.latency > speed.message_seconds(plan.message) / 2:
        found.append("a larger --micro-batch-size makes fewer of them")
    if roster[link.source].host != roster[link.to].host:
        found.append("both stages on one machine, or a faster link between them, would help")
    return "; ".join(found) or "a faster channel between the two would help"


def _about_replicas(
    topology: Topology,
    roster: Sequence[Participant],
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
    size = _size(plan.gradient_bytes(stage))
    told = (
        f"at each update the replicas of stage {stage} exchange {size} of gradients, which takes "
        f"about {_time(seconds)} ({_ends(roster, link)}: "
        f"{_rate(links[link])}) beside {_time(update)} of computing and messages"
    )
    if seconds > EXCHANGED * update:
        told += "; a larger --gradient-accumulate-step or --batch-size exchanges them less often"
    yield told


def _about_devices(roster: Sequence[Participant], rates: Sequence[float]) -> Iterator[str]:
    slow, fast = rates.index(min(rates)), rates.index(max(rates))
    if rates[fast] > UNLIKE * rates[slow]:
        ends = (f"{2e-9 * rates[r]:.3g} GFLOP/s on {_end(roster[r])}" for r in (slow, fast))
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


def _ends(roster: Sequence[Participant], link: Link) -> str:
    return f"{_end(roster[link.source])} -> {_end(roster[link.to])}"


def _end(arrival: Participant) -> str:
    return f"rank {arrival.rank} ({arrival.host})"


def _place(arrival: Participant) -> str:
    return f"{arrival.interface} ({arrival.address})" if arrival.interface else "none"


def _rate(speed: LinkSpeed) -> str:
    return f"{_size(round(speed.bytes_per_second))}/s"


def _size(nbytes: int) -> str:
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= of:
            return f"{nbytes / of:.3g} {unit}"
    return f"{nbytes} bytes"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
