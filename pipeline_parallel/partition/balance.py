"""The work of each stage in a split, and the search for the most balanced split.

Work is the number of multiply-adds per token in a forward pass. A backward pass multiplies the work
of all stages by the same factor, so it does not change the best split. The module imports no torch.
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
    """Returns the split that --num-layers requests; raises ValueError as `check_split` does."""
    if asked == AUTO:
        check_split(asked, num_stages=num_stages, model_layers=model_layers)
        return balanced_split(work, num_stages=num_stages, model_layers=model_layers)
    return fit_split(asked, num_stages=num_stages, model_layers=model_layers)


def balanced_split(
    work: ModuleWork, *, num_stages: int, model_layers: int, speeds: Sequence[float] | None = None
) -> Split:
    """Returns the split whose slowest stage has the least work; every stage has at least one block.

    If the slowest stages of several splits have the same work, the second-slowest stages decide,
    and so on. If the splits differ only in the order of the stages, the result has the fewest
    blocks on the first stages, because these stages keep the most activations in memory.

    The result is exact. The search adds one stage at a time. For each number of blocks on the
    stages so far, it keeps only the best split. No other split can win later: if the same next
    stage is added to two splits, the better of them stays the better one.

    Args:
        work: the work of a block and of the head.
        num_stages: the number of stages.
        model_layers: the number of blocks.
        speeds: the multiply-adds per second of each stage's device, if the devices differ. Then the
            seconds of a stage replace its work.
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
