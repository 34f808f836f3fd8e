"""The split of a model's blocks into stages, as --num-layers spells it and as the code has it.

The flag is `4` (so many blocks on each stage, the rest on the last), `5,3` (those of each stage) or
`auto`; the code has one form, `Split`. Needs no torch: flags are checked here.
"""

import re
from collections.abc import Sequence
from typing import Literal

AUTO: Literal["auto"] = "auto"
_SPELLING = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")


class Split(tuple[int, ...]):
    """The number of blocks of each stage, each at least 1; its text is that of the flag."""

    def __str__(self) -> str:
        return ",".join(map(str, self))


Layers = int | Split  # `4` and `5,3`
Asked = Layers | Literal["auto"]


def parse_layers(text: str) -> Layers:
    """Parses `4` or `5,3`; raises ValueError, without text, for all else and numbers below 1."""
    if not _SPELLING.fullmatch(text):
        raise ValueError
    counts = Split(map(int, text.split(",")))
    if min(counts) < 1:
        raise ValueError
    return counts if len(counts) > 1 else counts[0]


def even_split(per_stage: int, *, num_stages: int, model_layers: int) -> tuple[int, ...]:
    """Returns the blocks of each stage if stage i has those from i * per_stage on: perhaps none."""
    left = (model_layers - stage * per_stage for stage in range(num_stages))
    return tuple(max(0, min(per_stage, count)) for count in left)


def fit_split(layers: Layers, *, num_stages: int, model_layers: int) -> Split:
    """Returns the split that --num-layers asks for; raises ValueError as `check_split` does."""
    check_split(layers, num_stages=num_stages, model_layers=model_layers)
    if isinstance(layers, Split):
        return layers
    return Split(even_split(layers, num_stages=num_stages, model_layers=model_layers))


def check_split(asked: Asked, *, num_stages: int, model_layers: int) -> None:
    """Raises ValueError if the stages do not hold exactly the model's blocks, or one holds none."""
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
    """Raises ValueError if a list has another number of stages."""
    if len(split) != num_stages:
        raise ValueError(
            f"--num-layers {split} is for {len(split)} stages, but --pipeline-group-size is "
            f"{num_stages}"
        )


def stage_modules(stage: int, split: Sequence[int]) -> range:
    """Returns the modules of a stage: 0 is the embedding, 1..L are the blocks, L + 1 is the head.

    `split` has the number of blocks of each stage. The first stage also has the embedding, the last
    the head.
    """
    start = sum(split[:stage])
    first = 0 if stage == 0 else start + 1
    last = start + split[stage] + (1 if stage == len(split) - 1 else 0)
    return range(first, last + 1)
