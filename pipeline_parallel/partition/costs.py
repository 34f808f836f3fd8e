"""Costs of a microbatch on each stage of a split, in multiply-adds, for the simulator."""

from dataclasses import replace

from modules.model_sizes import ModuleWork
from pipeline_parallel.partition.balance import stage_work
from pipeline_parallel.partition.split import Split
from pipeline_parallel.schedule.schedules import SCHEDULES, splits_backward
from pipeline_parallel.schedule.simulator import StageCosts


def split_costs(
    layers: Split, work: ModuleWork, *, schedule: str, recompute: bool
) -> list[StageCosts]:
    """Returns the costs of a microbatch on each stage, in multiply-adds per token, not seconds."""
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
    """Returns the costs of a stage, from the multiply-adds of its blocks and its head.

    The head computes its gradients in forward (those of its weights later, where backward is split)
    and is never recomputed.
    """
    return StageCosts(
        forward=blocks + (2 if splits else 3) * head,
        input_gradient=(2 if recompute else 1) * blocks,
        weight_gradient=blocks + (head if splits else 0),
    )
