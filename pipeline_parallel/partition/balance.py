"""How much work each part of a model is, and the split whose slowest stage has the least of it.

The measure is multiply-adds of a forward pass per token: a function of config and sequence length
alone, in whole numbers, so that the same command gives the same split on every machine. A backward
pass multiplies all parts alike. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from modules.model_sizes import ModuleWork
from pipeline_parallel.partition.split import AUTO, Asked, Split, check_split, fit_split


def stage_work(split: Split, work: ModuleWork) -> tuple[int, ...]:
    """Multiply-adds per token of each stage."""
    last = len(split) - 1
    return tuple(
        count * work.block + (work.head if stage == last else 0)
        for stage, count in enumerate(split)
    )


def choose_split(asked: Asked, work: ModuleWork, *, num_stages: int, model_layers: int) -> Split:
    """The split that --num-layers asks for; ValueError as
    `pipeline_parallel.partition.split.check_split`."""
    if asked == AUTO:
        check_split(asked, num_stages=num_stages, model_layers=model_layers)
        return balanced_split(work, num_stages=num_stages, model_layers=model_layers)
    return fit_split(asked, num_stages=num_stages, model_layers=model_layers)


def balanced_split(
    work: ModuleWork, *, num_stages: int, model_layers: int, speeds: Sequence[float] | None = None
) -> Split:
    """The split whose slowest stage has the least work, every stage having a block at least.

    `speeds`: multiply-adds of each stage's device in a second, where they differ: then the measure
    is seconds.

    Of several, the one whose second-slowest stage has the least, and so on; of those that differ in
    their order alone, the one with the fewest blocks on the first stages, where schedules keep the
    most activations. Exact: the best of each number of blocks on the first stages, a stage at a
    time (adding one stage to two splits does not change which of them is better).
    """
    best: dict[int, tuple[tuple[float, ...], Split]] = {0: ((), Split())}
    for stage in range(num_stages):
        rest = num_stages - 1 - stage
        totals = range(stage + 1, model_layers - rest + 1) if rest else (model_layers,)
        head = 0 if rest else work.head
        speed = None if speeds is None else speeds[stage]
        best = {
            total: min(
                (
                    _slowest_first((*costs, _over((total - held) * work.block + head, speed))),
                    Split((*split, total - held)),
                )
                for held, (costs, split) in best.items()
                if held < total
            )
            for total in totals
        }
    return best[model_layers][1]


def _over(work: int, speed: float | None) -> float:
    return work if speed is None else work / speed  # whole numbers of any size stay exact


def _slowest_first(costs: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(costs, reverse=True))
