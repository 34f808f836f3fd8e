"""Resharding: the use of a checkpoint by a run with another split into stages.

For each stage of the run, these functions find the files of the checkpoint that hold the stage's
modules (embedding, blocks, head). Weights and optimizer state keep their values.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline_parallel.partition.split import AUTO, Asked, Split, stage_modules


def find_module(index: int, split: Split) -> tuple[int, int]:
    """Returns the stage that holds module `index` in `split`, and the module's number in the stage.

    The number is counted from 0. In the stage's file, the module's keys begin with this number.
    """
    for stage in range(len(split)):
        modules = stage_modules(stage, split)
        if index in modules:
            return stage, index - modules.start
    raise IndexError(f"module {index} is in no stage of {split}")


def stages_holding(indices: Iterable[int], split: Split) -> list[int]:
    """Returns the sorted stages of a checkpoint that hold the model's modules `indices`."""
    return sorted({find_module(index, split)[0] for index in indices})


def map_names(saved: range, indices: range, keys: Callable[[int], Iterable[str]]) -> dict[str, str]:
    """Maps the name of each weight in a stage of the run to the weight's name in a saved stage.

    The result has only the weights of modules that both stages hold.

    Args:
        saved: the modules of the saved stage.
        indices: the modules of the run's stage.
        keys: returns the names of the weights in the module with a given index.
    """
    return {
        f"{index - indices.start}.{key}": f"{index - saved.start}.{key}"
        for index in indices
        if index in saved
        for key in keys(index)
    }


@dataclass(frozen=True)
class ResumeSplit:
    """The split of the layers in a run that can resume from a checkpoint.

    requested: the value of --num-layers.
    resolved: the split that the run uses if there is no checkpoint.
    """

    requested: Asked
    resolved: Split

    def after(self, saved: Split) -> Split:
        """Returns the run's split if the run resumes from a checkpoint with the split `saved`.

        With --num-layers auto, the run keeps `saved` if the number of stages is unchanged. The
        checkpoint can be from another version of the program, whose `auto` gives another split.
        """
        keeps = self.requested == AUTO and len(saved) == len(self.resolved)
        return saved if keeps else self.resolved

    def differs_from(self, saved: Split) -> bool:
        """Returns whether the run's split differs from the checkpoint's split `saved`."""
        return self.after(saved) != saved

    def sources(self, stage: int, saved: Split) -> list[int]:
        """Returns the stages of the checkpoint whose files this run's `stage` needs."""
        return stages_holding(stage_modules(stage, self.after(saved)), saved)


def describe_change(saved: Split, now: Split) -> str:
    """Returns a log line such as `the checkpoint's 4 stages of 2,2,2,2 layers become 2 of 4,4`."""
    stages = "1 stage" if len(saved) == 1 else f"{len(saved)} stages"
    become = "becomes" if len(saved) == 1 else "become"
    return f"the checkpoint's {stages} of {saved} layers {become} {len(now)} of {now}"
