"""The split of a model's layers that --num-layers requests, and a log line about the split."""

from modules.model_sizes import ModelSizes, ModuleWork
from pipeline_parallel.partition.balance import choose_split, stage_work
from pipeline_parallel.partition.split import Asked, Split
from pipeline_parallel.schedule.schedules import SCHEDULES, splits_backward
from pipeline_parallel.schedule.simulator import Costs, StageCosts, simulate


class StageSplit:
    """The split of a model's layers that --num-layers requests, and the work of each layer.

    Args:
        asked: the value of --num-layers.
        sizes: the sizes of the model.
        num_stages: the number of stages.
        seq_len: the length of a sequence, in tokens.

    Raises:
        ValueError: this split of the model is not possible; the text names the flag.
    """

    def __init__(self, asked: Asked, sizes: ModelSizes, *, num_stages: int, seq_len: int) -> None:
        self._work = sizes.work(seq_len)
        self.asked = asked
        self.layers: Split = choose_split(
            asked, self._work, num_stages=num_stages, model_layers=sizes.layers
        )

    def describe(
        self, layers: Split, *, schedule: str, num_microbatches: int, recompute: bool
    ) -> str:
        """Returns a log line about `layers`, a split of this model.

        The line shows each stage's share of the work, the imbalance, and the expected bubble.
        """
        work = stage_work(layers, self._work)
        shares = ", ".join(f"{stage / sum(work):.1%}" for stage in work)
        imbalance = max(work) * len(work) / sum(work) - 1
        costs = split_costs(layers, self._work, schedule=schedule, recompute=recompute)
        simulated = simulate(SCHEDULES[schedule], len(layers), num_microbatches, Costs(costs))
        return (
            f"layers of the stages: {layers}; shares of the multiply-adds: {shares}; the "
            f"slowest stage has {imbalance:.1%} more than the mean; {schedule} of "
            f"{num_microbatches} microbatches: expected bubble {simulated.bubble:.1%}"
        )


def split_costs(
    layers: Split, work: ModuleWork, *, schedule: str, recompute: bool
) -> list[StageCosts]:
    """Returns the costs of each stage's actions, in multiply-adds per token instead of seconds.

    The head is never recomputed. Its forward also computes the gradient of its input. If the last
    stage has weight-gradient actions, they compute the gradients of the head's weights; otherwise
    the head's forward computes these gradients too.
    """
    costs, last = [], len(layers) - 1
    for stage, count in enumerate(layers):
        splits = splits_backward(SCHEDULES[schedule], stage, len(layers))
        blocks, head = count * work.block, work.head if stage == last else 0
        costs.append(
            StageCosts(
                forward=blocks + (2 if splits else 3) * head,
                input_gradient=(2 if recompute else 1) * blocks,
                weight_gradient=blocks + (head if splits else 0),
            )
        )
    return costs
