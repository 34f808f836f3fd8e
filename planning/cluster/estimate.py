"""What a step will take, from what devices and links were measured to do.

Products and messages alone are counted, so that no step takes less: norms, activations, the
optimizer and the host's own time come on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from comm.topology import Topology
from modules.model_sizes import ModelSizes, ModuleWork
from pipeline_parallel.partition.balance import balanced_split, stage_work
from pipeline_parallel.partition.costs import split_costs
from pipeline_parallel.partition.split import Split
from pipeline_parallel.schedule.schedules import SCHEDULES
from pipeline_parallel.schedule.simulator import Costs, StageCosts, simulate
from planning.cluster.link_probe import LinkSpeed
from planning.cluster.links import Link


@dataclass(frozen=True)
class RunShape:
    """What a run will do, as far as its speed is concerned.

    tokens: of a microbatch. message: bytes of its activations, or of their gradients.
    """

    model: ModelSizes
    work: ModuleWork
    layers: Split
    schedule: str
    recompute: bool
    num_microbatches: int
    accumulate: int
    tokens: int
    message: int

    def gradient_bytes(self, stage: int) -> int:
        """Of the fp32 gradients of a stage's matrices, which its replicas sum at each update."""
        model, last = self.model, len(self.layers) - 1
        ends = (stage == 0) + (stage == last)
        return 4 * (self.layers[stage] * model.block_weights + ends * model.head_weights)


class Estimate:
    """Of a plan on ranks with these rates (multiply-adds per second) and links."""

    def __init__(
        self,
        plan: RunShape,
        topology: Topology,
        *,
        rates: Sequence[float],
        links: Mapping[Link, LinkSpeed],
    ) -> None:
        self._plan, self._topology, self._rates, self._links = plan, topology, rates, links

    @cached_property
    def speeds(self) -> list[float]:
        """By stage, the multiply-adds per second of its slowest replica, whom the others await."""
        topology = self._topology
        return [
            min(self._rates[rank] for rank in topology.replica_ranks(stage))
            for stage in range(topology.num_stages)
        ]

    @cached_property
    def iteration(self) -> float:
        """Seconds of one iteration's forwards and backwards, of the slowest pipeline."""
        return max(self._pipeline(r, free=False) for r in range(self._topology.num_replicas))

    @cached_property
    def iteration_with_free_links(self) -> float:
        return max(self._pipeline(r, free=True) for r in range(self._topology.num_replicas))

    @cached_property
    def slowest_link(self) -> Link | None:
        """The pipelines' link on which a microbatch's message takes longest."""
        mine = [link for link in self._links if link.group == "pipeline"]
        return max(mine, key=self.message_seconds, default=None)

    def message_seconds(self, link: Link) -> float:
        return self._links[link].message_seconds(self._plan.message)

    def compute_seconds(self, link: Link) -> float:
        """What the receiver computes with one message of this pipeline's link."""
        topology = self._topology
        stage = link.to % topology.num_stages
        costs = self._costs(link.to // topology.num_stages)[stage]
        is_gradient = link.to < link.source
        return costs.input_gradient + costs.weight_gradient if is_gradient else costs.forward

    def stage_seconds(self, layers: Split) -> float:
        """Forward of a microbatch in the slowest stage, were the layers split so."""
        work = stage_work(layers, self._plan.work)
        return max(one / s for one, s in zip(work, self.speeds, strict=True)) * self._plan.tokens

    def balanced_layers(self) -> Split:
        """The split whose slowest stage takes the least."""
        return balanced_split(
            self._plan.work,
            num_stages=self._topology.num_stages,
            model_layers=self._plan.model.layers,
            speeds=self.speeds,
        )

    def exchange(self, stage: int) -> tuple[float, Link] | None:
        """Seconds that summing a stage's gradients takes over its replicas' slowest link, and that
        link. Each replica sends 2 (R - 1) / R of them."""
        ranks = set(self._topology.replica_ranks(stage))
        mine = [k for k in self._links if k.group == "replicas" and k.source in ranks]
        if not mine:
            return None
        replicas = self._topology.num_replicas
        nbytes = 2 * (replicas - 1) * self._plan.gradient_bytes(stage) // replicas
        return max((self._links[link].message_seconds(nbytes), link) for link in mine)

    def _pipeline(self, replica: int, *, free: bool) -> float:
        plan, num_stages = self._plan, self._topology.num_stages
        first = replica * num_stages
        onwards = [Link("pipeline", first + i, first + i + 1) for i in range(num_stages - 1)]
        costs = Costs(
            self._costs(replica),
            [0.0 if free else self.message_seconds(link) for link in onwards],
            [
                0.0 if free else self.message_seconds(link._replace(source=link.to, to=link.source))
                for link in onwards
            ],
        )
        return simulate(SCHEDULES[plan.schedule], num_stages, plan.num_microbatches, costs).total

    def _costs(self, replica: int) -> list[StageCosts]:
        plan = self._plan
        work = split_costs(plan.layers, plan.work, schedule=plan.schedule, recompute=plan.recompute)
        ranks = self._topology.pipeline_ranks(replica)
        return [
            _in_seconds(costs, plan.tokens / self._rates[rank])
            for costs, rank in zip(work, ranks, strict=True)
        ]


def _in_seconds(work: StageCosts, seconds: float) -> StageCosts:
    return StageCosts(
        forward=work.forward * seconds,
        input_gradient=work.input_gradient * seconds,
        weight_gradient=work.weight_gradient * seconds,
    )
