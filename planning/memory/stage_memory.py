"""The planned memory of one process of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageMemory:
    """The memory of one process; all values except `parameters` and `held` are bytes.

    Attributes:
        parameters: the number of parameters.
        weights, gradients: on the device all the time.
        optimizer: masters and moments on the device all the time; 0 if they are in `offloaded`.
        offloaded: in runs on a GPU, host memory for --use-offload; 0 in runs on a CPU.
        host_copy: in runs on a GPU, host memory for the copy of the state that --async-checkpoint
            makes; 0 in runs on a CPU.
        copied: in runs on a CPU, this copy; 0 in runs on a GPU.
        peak: the maximum on the device.
        held: the largest number of microbatches in flight at once.
        checkpoint: the stage's files in a checkpoint.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    offloaded: int
    host_copy: int
    copied: int
    peak: int
    held: int
    checkpoint: int

    @property
    def host(self) -> int:
        """Returns the bytes in host memory beside a GPU, as torch rounds those that are pinned."""
        return self.offloaded + self.host_copy

    @property
    def activations(self) -> int:
        """Returns the peak minus permanent bytes: activations, messages and temporary tensors."""
        return self.peak - self.weights - self.gradients - self.optimizer - self.copied
