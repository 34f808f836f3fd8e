"""Resharding: the files of a checkpoint with other stages that hold the modules of a stage.

It depends on the two splits alone. Weights and optimizer state do not change.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline_parallel.partition.split import AUTO, Asked, Split, stage_modules


def find_module(index: int, split: Split) -> tuple[int, int]:
    """Returns the stage that saved module `index` at that split, and the j of its keys there."""
    for stage in range(len(split)):
        modules = stage_modules(stage, split)
        if index in modules:
            return stage, index - modules.start
    raise IndexError(f"module {index} is in no stage of {split}")


def stages_holding(indices: Iterable[int], split: Split) -> list[int]:
    """Returns the stages of a checkpoint of that split that hold the model's modules `indices`."""
    return sorted({find_module(index, split)[0] for index in indices})


def map_names(saved: range, indices: range, keys: Callable[[int], Iterable[str]]) -> dict[str, str]:
    """Maps the names of a stage's weights to their names in a saved stage that has them too.

    Args:
        saved: the modules of the saved stage.
        indices: the modules of the run's stage.
        keys: returns the weights' names in a module of the model.
    """
    return {
        f"{index - indices.start}.{key}": f"{index - saved.start}.{key}"
        for index in indices
        if index in saved
        for key in keys(index)
    }


@dataclass(frozen=True)
class ResumeSplit:
    """The split of the layers of a run that may go on from a checkpoint.

    requested: the value of --num-layers.
    resolved: the split that it gives on this run's stages without a checkpoint.
    """

    requested: Asked
    resolved: Split

    def after(self, saved: Split) -> Split:
        """Returns the run's split if it goes on from a checkpoint with the split `saved`.

        `auto` keeps it on as many stages, since another version may weigh the layers differently.
        """
        keeps = self.requested == AUTO and len(saved) == len(self.resolved)
        return saved if keeps else self.resolved

    def differs_from(self, saved: Split) -> bool:
        """Whether the run has another split than its checkpoint."""
        return self.after(saved) != saved

    def sources(self, stage: int, saved: Split) -> list[int]:
        """Returns the checkpoint's stages whose files this run's `stage` needs."""
        return stages_holding(stage_modules(stage, self.after(saved)), saved)


def describe_change(saved: Split, now: Split) -> str:
    """Returns `the checkpoint's 4 stages of 2,2,2,2 layers become 2 of 4,4`."""
    stages = "1 stage" if len(saved) == 1 else f"{len(saved)} stages"
    become = "becomes" if len(saved) == 1 else "become"
    return f"the checkpoint's {stages} of {saved} layers {become} {len(now)} of {now}"
