"""How much work each part of a model is, and the split whose slowest stage has the least of it.

The measure is multiply-adds of a forward pass per token: a function of config and sequence length
alone, in whole numbers, so that the same command gives the same split on every machine. A backward
pass multiplies all parts alike. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.registry import ModelEntry
from pipeline_parallel.partition.split import AUTO, Asked, Split, check_split, fit_split


@dataclass(frozen=True)
class ModuleWork:
    """Multiply-adds per token of a block and of the head; the embedding, a lookup, has none."""

    block: int
    head: int


def module_work(entry: ModelEntry, config: Mapping[str, Any], *, tokens: int) -> ModuleWork:
    """Of a family's model with this config.json, on sequences of `tokens`.

    A block has four hidden x hidden projections, two hidden x inner ones, and attention's scores
    and values: the t-th token meets t keys, so that the mean over a sequence is (tokens + 1) / 2,
    twice hidden each (the causal half; what a kernel computes of the other half is waste). The head
    is hidden x vocabulary. Norms, activations and rotations are no products. ValueError names a
    field that is no whole number above 0.
    """
    hidden, vocabulary = _number(config, entry.hidden_size), _number(config, entry.vocab_size)
    inner = 4 * hidden
    if config.get(entry.inner_size) is not None:
        inner = _number(config, entry.inner_size)
    projections, attention = 4 * hidden + 2 * inner, tokens + 1
    return ModuleWork(block=hidden * (projections + attention), head=hidden * vocabulary)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}, expected a whole number above 0")
    return value


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
