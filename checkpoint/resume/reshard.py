"""Resharding: which files of a checkpoint with other stages hold the modules of a stage.

The checkpoint's split and the run's split are the only inputs; weights and optimizer state do not
change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pipeline_parallel.partition.split import AUTO, Asked, Split, stage_modules


class ModuleLocation(NamedTuple):
    """Where a checkpoint has a module: the stage that saved it, and the j of its keys there."""

    stage: int
    j: int


def find_module(index: int, split: Split) -> ModuleLocation:
    """The place of the model's module `index` in a checkpoint of that split."""
    held = (stage_modules(stage, split) for stage in range(len(split)))
    return next(ModuleLocation(s, index - has.start) for s, has in enumerate(held) if index in has)


def stages_holding(indices: Iterable[int], split: Split) -> list[int]:
    """The stages of a checkpoint of that split that hold the model's modules `indices`."""
    return sorted({find_module(index, split).stage for index in indices})


def names_in(held: range, indices: range, keys: Callable[[int], Iterable[str]]) -> dict[str, str]:
    """What a stage with modules `held` calls the weights that a stage with `indices` has too, by
    what that calls them; `keys` are those of a module of the model."""
    return {
        f"{index - indices.start}.{key}": f"{index - held.start}.{key}"
        for index in indices
        if index in held
        for key in keys(index)
    }


@dataclass(frozen=True)
class Continuation:
    """How a run is split that goes on from a checkpoint: `asked` is what --num-layers says, and
    `chosen` what that comes to on this run's stages."""

    asked: Asked
    chosen: Split

    def split_after(self, kept: Split) -> Split:
        """The run's split, where the checkpoint's is `kept`.

        For auto that same one if there are as many stages, since another version may weigh
        otherwise.
        """
        as_many = len(kept) == len(self.chosen)
        return kept if self.asked == AUTO and as_many else self.chosen

    def is_change(self, kept: Split) -> bool:
        """Whether the run is split otherwise than its checkpoint."""
        return self.split_after(kept) != kept

    def sources(self, stage: int, kept: Split) -> list[int]:
        """The checkpoint's stages whose files this run's `stage` needs."""
        return stages_holding(stage_modules(stage, self.split_after(kept)), kept)


def describe_change(kept: Split, now: Split) -> str:
    """`the checkpoint's 4 stages of 2,2,2,2 layers become 2 of 4,4`."""
    stages = "1 stage" if len(kept) == 1 else f"{len(kept)} stages"
    become = "becomes" if len(kept) == 1 else "become"
    return f"the checkpoint's {stages} of {kept} layers {become} {len(now)} of {now}"
