"""Hooks for tests.support.cases.Case that make a number infinite in one process."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from comm.topology import Topology
from data_parallel.replica_gradients import ReplicaGradients
from modules.layers import lm_head as head
from modules.stage_model import StageModel
from pipeline_parallel.engine import Engine, Losses
from training.iteration import Iteration

PARAMETER = 3  # index of the parameter in its stage


@dataclass(frozen=True)
class Overflow:
    """Hook: on `rank`, a gradient contains inf in each of `steps` (None: in every step)."""

    rank: int
    steps: Collection[int] | None

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        train = Engine.train

        def poisoned(engine: Engine, *args: Any, **options: Any) -> Losses:
            if topology.rank == self.rank and (self.steps is None or now[0] in self.steps):
                views = begun[0].buffer.views
                name = begun[0].partition.names[PARAMETER]
                views[name].view(-1)[1] = math.inf
            return train(engine, *args, **options)

        with _step_noted() as now, _begun() as begun, patch.object(Engine, "train", poisoned):
            yield


@dataclass(frozen=True)
class BadOutput:
    """Hook: on `rank`, in `step`, the stage's output for `microbatch` contains inf.

    The inf appears again when Engine.find_not_finite repeats the forward of the batch.
    """

    rank: int
    step: int
    microbatch: int

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        run, seen = StageModel._up_to_head, [0, 0]  # last step, its microbatches so far

        def poisoned(
            model: StageModel, x: torch.Tensor, *args: Any, **options: Any
        ) -> torch.Tensor:
            out = run(model, x, *args, **options)
            seen[:] = [now[0], 0 if seen[0] != now[0] else seen[1]]
            here = seen[1] % NUM_MICROBATCHES == self.microbatch and now[0] == self.step
            seen[1] += 1
            if here and topology.rank == self.rank:
                out = out + math.inf
            return out

        with _step_noted() as now, patch.object(StageModel, "_up_to_head", poisoned):
            yield


@dataclass(frozen=True)
class InfiniteLoss:
    """Hook: on `rank`, one microbatch's loss is inf, but the gradients are finite.

    A logit of -inf would have this effect. `rank` must be the last stage of a pipeline.
    step: the training step in which the loss is inf.
    calls: the calls of Engine.evaluate, counted from 0, in which the loss is inf.
    """

    rank: int
    step: int | None = None
    calls: Collection[int] = ()

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        train, evaluate, seen = Engine.train, Engine.evaluate, [0]

        def with_inf(losses: Losses, due: bool) -> Losses:
            if not due or topology.rank != self.rank:
                return losses
            return losses._replace(of_microbatches=[*losses.of_microbatches[:-1], math.inf])

        def trained(engine: Engine, *args: Any, **options: Any) -> Losses:
            return with_inf(train(engine, *args, **options), now[0] == self.step)

        def evaluated(engine: Engine, *args: Any, **options: Any) -> Losses:
            seen[0] += 1
            return with_inf(evaluate(engine, *args, **options), seen[0] - 1 in self.calls)

        with (
            _step_noted() as now,
            patch.object(Engine, "train", trained),
            patch.object(Engine, "evaluate", evaluated),
        ):
            yield


@dataclass(frozen=True)
class BadLogit:
    """Hook: on `rank`, in `step`, the logit of the first label is -inf.

    The loss is infinite, and its gradients are finite.
    """

    rank: int
    step: int

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        losses_of = head.token_losses_

        def poisoned(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            if topology.rank == self.rank and now[0] == self.step:
                logits[0, labels[0]] = -math.inf
            return losses_of(logits, labels)

        with _step_noted() as now, patch.object(head, "token_losses_", poisoned):
            yield


NUM_MICROBATCHES = 2  # of a pipeline's batch; BadOutput relies on it


@contextmanager
def _begun() -> Iterator[list[ReplicaGradients]]:
    """Yields a list of one item: the ReplicaGradients object whose update began last."""
    begin, begun = ReplicaGradients.begin_update, list[ReplicaGradients]()

    def noted(gradients: ReplicaGradients, num_microbatches: int) -> None:
        begun[:] = [gradients]
        begin(gradients, num_microbatches)

    with patch.object(ReplicaGradients, "begin_update", noted):
        yield begun


@contextmanager
def _step_noted() -> Iterator[list[int]]:
    """Yields a list with the number of the current iteration."""
    iterate, now = Iteration._run, [0]

    def noted(loop: Iteration, step: int, is_writing: Any) -> Any:
        now[0] = step
        return iterate(loop, step, is_writing)

    with patch.object(Iteration, "_run", noted):
        yield now
