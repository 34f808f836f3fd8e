"""How a model's blocks are cut into stages, as flags spell it and as the rest of the code has it.

A flag says `4` (so many to each stage, what is left to the last), `5,3` (each stage's own) or
`auto`. Below the entry scripts there is one form, `Split`. Needs no torch: flags are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

AUTO: Literal["auto"] = "auto"
_SPELLING = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")


class Split(tuple[int, ...]):
    """Blocks of each stage, in order, each at least 1; its text is what a user would write."""

    def __str__(self) -> str:
        return ",".join(map(str, self))


Layers = int | Split  # what `4` and `5,3` mean
Asked = Layers | Literal["auto"]


def parse_layers(text: str) -> Layers:
    """`4` or `5,3`; ValueError, without text, for anything else, numbers below 1 included."""
    if not _SPELLING.fullmatch(text):
        raise ValueError
    counts = Split(map(int, text.split(",")))
    if min(counts) < 1:
        raise ValueError
    return counts if len(counts) > 1 else counts[0]


def even_split(per_stage: int, *, num_stages: int, model_layers: int) -> tuple[int, ...]:
    """Stage i has blocks [i * per_stage, (i + 1) * per_stage) of those there are: none, perhaps."""
    left = (model_layers - stage * per_stage for stage in range(num_stages))
    return tuple(max(0, min(per_stage, count)) for count in left)


def fit_split(layers: Layers, *, num_stages: int, model_layers: int) -> Split:
    """The split that --num-layers asks for; ValueError as `check_split`."""
    check_split(layers, num_stages=num_stages, model_layers=model_layers)
    if isinstance(layers, Split):
        return layers
    return Split(even_split(layers, num_stages=num_stages, model_layers=model_layers))


def check_split(asked: Asked, *, num_stages: int, model_layers: int) -> None:
    """Raises ValueError, naming --num-layers, where the stages would not hold just the model's
    blocks, or one would hold none."""
    if isinstance(asked, Split):
        check_length(asked, num_stages)
        if sum(asked) != model_layers:
            raise ValueError(
                f"--num-layers {asked} holds {sum(asked)} layers, but the model has {model_layers}"
            )
        return
    split = f"--num-layers {asked} on {num_stages} stages"
    if asked == AUTO:
        if num_stages > model_layers:
            raise ValueError(f"{split} leaves stages none of the {model_layers} layers")
    elif asked * num_stages < model_layers:
        raise ValueError(
            f"{split} holds {asked * num_stages} layers, but the model has {model_layers}"
        )
    elif asked * (num_stages - 1) >= model_layers:
        raise ValueError(f"{split} leaves stage {num_stages - 1} none of the {model_layers} layers")


def check_length(split: Split, num_stages: int) -> None:
    """Raises ValueError where a list has not one number for each stage."""
    if len(split) != num_stages:
        raise ValueError(
            f"--num-layers {split} is for {len(split)} stages, but --pipeline-group-size is "
            f"{num_stages}"
        )


def stage_modules(stage: int, split: Sequence[int]) -> range:
    """Which of the model's modules (0 the embedding, 1..L the blocks, L + 1 the head) a stage has.

    `split` has the number of blocks of each stage; the first stage has the embedding too, the last
    the head.
    """
    start = sum(split[:stage])
    first = 0 if stage == 0 else start + 1
    last = start + split[stage] + (1 if stage == len(split) - 1 else 0)
    return range(first, last + 1)
