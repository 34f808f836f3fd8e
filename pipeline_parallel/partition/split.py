"""The split of a model's blocks into stages: the value of --num-layers, and the class `Split`.

The value is `4` (4 blocks on each stage except the last, which has the rest: 1 to 4 blocks), `5,3`
(5 blocks on the first stage and 3 on the second) or `auto` (the most balanced split). The module
imports no torch, because flags are checked before torch is loaded.
"""

import re
from collections.abc import Sequence
from typing import Literal

AUTO: Literal["auto"] = "auto"
_SPELLING = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")


class Split(tuple[int, ...]):
    """The number of blocks on each stage, at least 1; str() returns the form of the flag: `5,3`."""

    def __str__(self) -> str:
        return ",".join(map(str, self))


Layers = int | Split  # `4` and `5,3`
Asked = Layers | Literal["auto"]


def parse_layers(text: str) -> Layers:
    """Returns the int or the `Split` that `text` describes, for example `4` or `5,3`.

    Raises ValueError without a message if `text` has another form or a number is below 1.
    """
    if not _SPELLING.fullmatch(text):
        raise ValueError
    counts = Split(map(int, text.split(",")))
    if min(counts) < 1:
        raise ValueError
    return counts if len(counts) > 1 else counts[0]


def even_split(per_stage: int, *, num_stages: int, model_layers: int) -> tuple[int, ...]:
    """Returns the number of blocks on each stage: `per_stage`, as long as blocks are left.

    So the last stages can have fewer blocks or none. No stage has more than `per_stage`.
    """
    left = (model_layers - stage * per_stage for stage in range(num_stages))
    return tuple(max(0, min(per_stage, count)) for count in left)


def fit_split(layers: Layers, *, num_stages: int, model_layers: int) -> Split:
    """Returns the split that --num-layers requests; raises ValueError as `check_split` does."""
    check_split(layers, num_stages=num_stages, model_layers=model_layers)
    if isinstance(layers, Split):
        return layers
    return Split(even_split(layers, num_stages=num_stages, model_layers=model_layers))


def check_split(asked: Asked, *, num_stages: int, model_layers: int) -> None:
    """Raises ValueError unless the stages hold exactly the model's blocks and no stage is empty.

    `asked` is the value of --num-layers.
    """
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
            raise ValueError(f"{split}: some stages would hold none of the {model_layers} layers")
    elif asked * num_stages < model_layers:
        raise ValueError(
            f"{split} holds {asked * num_stages} layers, but the model has {model_layers}"
        )
    elif asked * (num_stages - 1) >= model_layers:
        raise ValueError(
            f"{split}: stage {num_stages - 1} would hold none of the {model_layers} layers"
        )


def check_length(split: Split, num_stages: int) -> None:
    """Raises ValueError if the length of a split is not the number of stages."""
    if len(split) != num_stages:
        raise ValueError(
            f"--num-layers {split} is for {len(split)} stages, but --pipeline-group-size is "
            f"{num_stages}"
        )


def stage_modules(stage: int, split: Sequence[int]) -> range:
    """Returns the modules of a stage: 0 is the embedding, 1..L are the blocks, L + 1 is the head.

    `split` has the number of blocks on each stage. The first stage also has the embedding, and the
    last stage has the head.
    """
    start = sum(split[:stage])
    first = 0 if stage == 0 else start + 1
    last = start + split[stage] + (1 if stage == len(split) - 1 else 0)
    return range(first, last + 1)
