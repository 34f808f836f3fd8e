"""The work of each stage of a split, and the split whose slowest stage has the least work.

Work is multiply-adds of a forward pass per token, in integers; a backward pass multiplies all parts
alike. Needs no torch.
"""

from collections.abc import Sequence

from modules.model_sizes import ModuleWork
from pipeline_parallel.partition.split import AUTO, Asked, Split, check_split, fit_split


def stage_work(split: Split, work: ModuleWork) -> tuple[int, ...]:
    """Returns the multiply-adds per token of each stage."""
    last = len(split) - 1
    return tuple(
        count * work.block + (work.head if stage == last else 0)
        for stage, count in enumerate(split)
    )


def choose_split(asked: Asked, work: ModuleWork, *, num_stages: int, model_layers: int) -> Split:
    """Returns the split that --num-layers asks for; raises ValueError as `check_split` does."""
    if asked == AUTO:
        check_split(asked, num_stages=num_stages, model_layers=model_layers)
        return balanced_split(work, num_stages=num_stages, model_layers=model_layers)
    return fit_split(asked, num_stages=num_stages, model_layers=model_layers)


def balanced_split(
    work: ModuleWork, *, num_stages: int, model_layers: int, speeds: Sequence[float] | None = None
) -> Split:
    """Returns the split whose slowest stage has the least work; every stage has a block.

    Of several such splits it is the one whose second-slowest stage has the least work, and so on.
    Of splits that differ in their order alone, it is the one with the fewest blocks on the first
    stages, where schedules keep the most activations.

    The result is exact: the best split is found for each number of blocks on the first stages, a
    stage at a time, since adding one stage to two splits does not change which of them is better.

    Args:
        work: of a block and of the head.
        num_stages: the number of stages.
        model_layers: the number of blocks.
        speeds: multiply-adds per second of each stage's device, where they differ; the slowest
            stage is then the one that takes the most seconds.
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
                    _slowest_first((*costs, _over((total - before) * work.block + head, speed))),
                    Split((*split, total - before)),
                )
                for before, (costs, split) in best.items()
                if before < total
            )
            for total in totals
        }
    return best[model_layers][1]


def _over(work: int, speed: float | None) -> float:
    return work if speed is None else work / speed  # integers of any size stay exact


def _slowest_first(costs: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(costs, reverse=True))
