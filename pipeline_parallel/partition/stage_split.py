"""How a run's model is split over its stages: chosen, kept on resume, told at the start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint.resume.reshard import Continuation, describe_change
from checkpoint.resume.saved_split import kept_split
from comm.communicator import Communicator
from comm.objects import broadcast_json
from modules.registry import MODELS
from pipeline_parallel.partition.balance import ModuleWork, choose_split, module_work, stage_work
from pipeline_parallel.partition.split import Asked, Split
from pipeline_parallel.schedule.schedules import SCHEDULES, splits_backward
from pipeline_parallel.schedule.simulator import Costs, StageCosts, simulate

logger = logging.getLogger(__name__)


class StageSplit:
    """The split of a run, from what --num-layers `asked` for, a model's config and the sequences'
    length. ValueError, naming the flag, where the model cannot be split so.

    `source` is the split of the checkpoint that the run goes on from; a predecessor's must be the
    run's own.
    """

    def __init__(
        self, asked: Asked, model_type: str, config: Any, *, num_stages: int, tokens: int
    ) -> None:
        self._work: ModuleWork = module_work(MODELS[model_type], config.to_dict(), tokens=tokens)
        self.layers: Split = choose_split(
            asked, self._work, num_stages=num_stages, model_layers=config.num_hidden_layers
        )
        self.continuation = Continuation(asked, self.layers)
        self.source = self.layers

    def go_on(self, folder: Path, meta: Mapping[str, Any], control: Communicator) -> None:
        """Goes on from the step in `folder`, whose meta.json is `meta`, and whose split becomes
        `source`; told where that is not the one chosen now.

        Every process calls it; ValueError on rank 0 where meta.json tells no split of this model.
        """
        chosen, kept = self.layers, None
        if control.rank == 0:
            kept = kept_split(folder / "meta.json", meta, sum(chosen))
        self.source = Split(broadcast_json(control, kept))
        self.layers = self.continuation.split_after(self.source)
        if control.rank == 0 and self.layers != self.source:
            logger.info("%s", describe_change(self.source, self.layers))
        elif control.rank == 0 and self.layers != chosen:
            logger.info(
                "--num-layers %s would be %s now: the checkpoint's %s is kept",
                self.continuation.asked,
                chosen,
                self.source,
            )

    def describe(self, *, schedule: str, num_microbatches: int, recompute: bool) -> str:
        """The split, each stage's share of the work, the imbalance, and the bubble to expect, in
        one line."""
        work = stage_work(self.layers, self._work)
        shares = ", ".join(f"{one / sum(work):.1%}" for one in work)
        imbalance = max(work) * len(work) / sum(work) - 1
        return (
            f"layers of the stages: {self.layers}; shares of the multiply-adds: {shares}; the "
            f"slowest stage has {imbalance:.1%} more than the mean; {schedule} of "
            f"{num_microbatches} microbatches: expected bubble "
            f"{self._bubble(schedule, num_microbatches, recompute):.1%}"
        )

    def _bubble(self, schedule: str, num_microbatches: int, recompute: bool) -> float:
        """The idle share of all stages, where time is multiply-adds: the gradients of the input and
        those of the weights take as many as forward does."""
        num_stages = len(self.layers)
        costs = split_costs(self.layers, self._work, schedule=schedule, recompute=recompute)
        return simulate(SCHEDULES[schedule], num_stages, num_microbatches, Costs(costs)).bubble


def split_costs(
    layers: Split, work: ModuleWork, *, schedule: str, recompute: bool
) -> list[StageCosts]:
    """What a microbatch is to each stage, in multiply-adds per token instead of seconds."""
    of_blocks, num_stages = stage_work(layers, replace(work, head=0)), len(layers)
    return [
        _costs(
            blocks,
            of_stage - blocks,
            splits=splits_backward(SCHEDULES[schedule], stage, num_stages),
            recompute=recompute,
        )
        for stage, (blocks, of_stage) in enumerate(
            zip(of_blocks, stage_work(layers, work), strict=True)
        )
    ]


def _costs(blocks: int, head: int, *, splits: bool, recompute: bool) -> StageCosts:
    """Of a stage with so many multiply-adds in its blocks and its head, which makes its gradients
    in forward (those of its weights later, where backward is split) and is never recomputed."""
    return StageCosts(
        forward=blocks + (2 if splits else 3) * head,
        input_gradient=(2 if recompute else 1) * blocks,
        weight_gradient=blocks + (head if splits else 0),
    )
