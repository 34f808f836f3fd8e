"""An estimate of a step's seconds, from the measured speeds of devices and links.

The estimate is a lower bound, because it counts only matmuls and messages. Norms, activation
functions, the optimizer and the host need more time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from arguments.settings import Settings
from comm.topology import Topology
from common.tensors import DTYPES
from modules.model_sizes import ModelSizes, ModuleWork
from pipeline_parallel.partition.balance import balanced_split, choose_split, stage_work
from pipeline_parallel.partition.split import Split
from pipeline_parallel.partition.stage_split import split_costs
from pipeline_parallel.schedule.schedules import SCHEDULES
from pipeline_parallel.schedule.simulator import Costs, StageCosts, simulate
from planning.cluster.link_probe import Link, LinkSpeed


@dataclass(frozen=True)
class RunShape:
    """The properties of a run that determine its speed.

    Attributes:
        tokens: the tokens of a microbatch.
        message: the bytes of a microbatch's activations; the gradients of these activations have
            as many bytes.
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
        """Returns the bytes of a stage's fp32 gradients, which its replicas sum at each update."""
        model, last = self.model, len(self.layers) - 1
        ends = (stage == 0) + (stage == last)
        return 4 * (self.layers[stage] * model.block_weights + ends * model.head_weights)


def make_run_shape(settings: Settings, sizes: ModelSizes) -> RunShape | None:
    """Returns the `RunShape` of a run with this model; None if --num-layers cannot split it."""
    update = settings.update
    work = sizes.work(update.seq_length)
    try:
        layers = choose_split(
            settings.model.num_layers,
            work,
            num_stages=settings.parallel.pipeline_group_size,
            model_layers=sizes.layers,
        )
    except ValueError:
        return None  # MachineFacts.problems has this error
    return RunShape(
        model=sizes,
        work=work,
        layers=layers,
        schedule=settings.parallel.pp_mode,
        recompute=settings.precision.recompute == "true",  # auto counts as false: a lower bound
        num_microbatches=update.num_microbatches,
        accumulate=update.gradient_accumulate_step,
        tokens=update.micro_batch_size * update.seq_length,
        message=activation_bytes(settings),
    )


def activation_bytes(settings: Settings) -> int:
    """Returns the bytes of a microbatch's activations between two stages."""
    update, dtype = settings.update, DTYPES[settings.precision.precision]
    tokens = update.micro_batch_size * update.seq_length
    return tokens * settings.model.embedding_dim * dtype.itemsize


@dataclass(frozen=True, eq=False)
class Estimate:
    """The expected times of a run; `rates[r]` is rank r's number of multiply-adds per second."""

    plan: RunShape
    topology: Topology
    rates: Sequence[float]
    links: Mapping[Link, LinkSpeed]

    @cached_property
    def speeds(self) -> list[float]:
        """Returns the multiply-adds per second of each stage's slowest replica."""
        topology = self.topology
        return [
            min(self.rates[rank] for rank in topology.replica_ranks(stage))
            for stage in range(topology.num_stages)
        ]

    @cached_property
    def iteration(self) -> float:
        """Returns the seconds of an iteration's forwards and backwards in the slowest pipeline."""
        return self._slowest_pipeline(self.message_seconds)

    @cached_property
    def iteration_with_free_links(self) -> float:
        return self._slowest_pipeline(lambda _: 0.0)

    @cached_property
    def slowest_link(self) -> Link | None:
        """Returns the link between stages on which a microbatch's message takes longest."""
        candidates = (link for link in self.links if link.group == "pipeline")
        return max(candidates, key=self.message_seconds, default=None)

    def message_seconds(self, link: Link) -> float:
        return self.links[link].message_seconds(self.plan.message)

    def compute_seconds(self, link: Link) -> float:
        """Returns the seconds of the receiving stage's work on one message: forward or backward."""
        replica, stage = divmod(link.to, self.topology.num_stages)
        costs = self._costs(replica)[stage]
        is_gradient = link.to < link.source
        return costs.input_gradient + costs.weight_gradient if is_gradient else costs.forward

    def stage_seconds(self, layers: Split) -> float:
        """Returns the seconds of a microbatch's forward on the slowest stage of the split."""
        pairs = zip(stage_work(layers, self.plan.work), self.speeds, strict=True)
        return max(work / speed for work, speed in pairs) * self.plan.tokens

    def balanced_layers(self) -> Split:
        """Returns the split that minimizes the time of the slowest stage."""
        num_stages, model_layers = self.topology.num_stages, self.plan.model.layers
        return balanced_split(
            self.plan.work, num_stages=num_stages, model_layers=model_layers, speeds=self.speeds
        )

    def exchange(self, stage: int) -> tuple[float, Link] | None:
        """Returns how long the replicas take to sum a stage's gradients, and their slowest link.

        Each of R replicas sends 2 (R - 1) / R times the bytes of the gradients. The estimate is the
        seconds of these bytes on the slowest link. Returns None if there is only one replica.
        """
        replicas = self.topology.num_replicas
        ranks = self.topology.replica_ranks(stage)
        nbytes = 2 * (replicas - 1) * self.plan.gradient_bytes(stage) // replicas
        return max(
            (
                (speed.message_seconds(nbytes), link)
                for link, speed in self.links.items()
                if link.group == "replicas" and link.source in ranks
            ),
            default=None,
        )

    def _slowest_pipeline(self, seconds: Callable[[Link], float]) -> float:
        return max(self._pipeline(r, seconds) for r in range(self.topology.num_replicas))

    def _pipeline(self, replica: int, seconds: Callable[[Link], float]) -> float:
        plan, num_stages = self.plan, self.topology.num_stages
        pairs = list(pairwise(self.topology.pipeline_ranks(replica)))
        costs = Costs(
            self._costs(replica),
            [seconds(Link("pipeline", a, b)) for a, b in pairs],
            [seconds(Link("pipeline", b, a)) for a, b in pairs],
        )
        return simulate(SCHEDULES[plan.schedule], num_stages, plan.num_microbatches, costs).total

    def _costs(self, replica: int) -> list[StageCosts]:
        plan, ranks = self.plan, self.topology.pipeline_ranks(replica)
        work = split_costs(plan.layers, plan.work, schedule=plan.schedule, recompute=plan.recompute)
        seconds = [plan.tokens / self.rates[rank] for rank in ranks]
        return [
            StageCosts(w.forward * s, w.input_gradient * s, w.weight_gradient * s)
            for w, s in zip(work, seconds, strict=True)
        ]
