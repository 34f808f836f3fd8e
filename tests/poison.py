"""Hooks for tests.runs.Case that put a number which is not finite into one process's training."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from comm.topology import Topology
from optimizer.mixed_precision import MixedPrecisionOptimizer
from pipeline_parallel.stage import Stage
from training_loop import TrainingLoop

PARAMETER = 3  # of its stage: whose gradient is poisoned


@dataclass(frozen=True)
class Overflow:
    """On `rank`, at each of `steps` (None: at all), a gradient holds inf before it is reduced."""

    rank: int
    steps: Collection[int] | None

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        reduce = MixedPrecisionOptimizer.reduce_gradients

        def poisoned(optimizer: MixedPrecisionOptimizer) -> None:
            if topology.rank == self.rank and (self.steps is None or now[0] in self.steps):
                name = optimizer.names[PARAMETER]
                optimizer._gradients.views[name].view(-1)[1] = math.inf
            reduce(optimizer)

        with (
            _step_noted() as now,
            patch.object(MixedPrecisionOptimizer, "reduce_gradients", poisoned),
        ):
            yield


@dataclass(frozen=True)
class BadOutput:
    """On `rank`, in `step`, the stage turns `microbatch` into something that holds inf.

    It does so again where the batch is evaluated to find out.
    """

    rank: int
    step: int
    microbatch: int

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        run, seen = Stage._run, [0, 0]  # the last step, and its microbatches so far

        def poisoned(stage: Stage, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            out = run(stage, x, *args, **options)
            seen[:] = [now[0], 0 if seen[0] != now[0] else seen[1]]
            here = seen[1] % NUM_MICROBATCHES == self.microbatch and now[0] == self.step
            seen[1] += 1
            if here and topology.rank == self.rank:
                out = out + math.inf
            return out

        with _step_noted() as now, patch.object(Stage, "_run", poisoned):
            yield


NUM_MICROBATCHES = 2  # of a pipeline's batch, which BadOutput counts on


@contextmanager
def _step_noted() -> Iterator[list[int]]:
    """The number of the iteration under way, in a list of one."""
    iterate, now = TrainingLoop._iterate, [0]

    def noted(loop: TrainingLoop, step: int) -> Any:
        now[0] = step
        return iterate(loop, step)

    with patch.object(TrainingLoop, "_iterate", noted):
        yield now
