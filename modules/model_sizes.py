"""The sizes of a model, and its work in multiply-adds. This module needs no torch.

The multiply-adds of a forward pass per token depend only on the config and the sequence length.
They are integers, so a command gives the same numbers on every machine. Norms, activations and
rotations are not counted.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ModuleWork:
    """The multiply-adds per token of a block and of the head; the embedding needs none."""

    block: int
    head: int


class ModelSizes(NamedTuple):
    """The sizes of a model; its family reads the sizes from the config.

    hidden: the width of activations. inner: the width of the feed-forward part.
    block_weights: the number of elements in a block's matrices. Each element needs one multiply-add
        per token.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    block_weights: int

    def work(self, seq_len: int) -> ModuleWork:
        """Returns the multiply-adds per token in sequences of `seq_len` tokens.

        In attention a token needs `hidden` multiply-adds for scores and `hidden` for values, for
        every key up to its own position: (seq_len + 1) / 2 keys on average. (Some kernels also
        compute the masked half; this is not counted.)
        """
        attention = self.hidden * (seq_len + 1)
        return ModuleWork(self.block_weights + attention, self.head_weights)

    def multiply_adds(self, seq_len: int) -> int:
        """Returns the multiply-adds per token of a forward pass through the complete model."""
        work = self.work(seq_len)
        return self.layers * work.block + work.head

    @property
    def head_weights(self) -> int:
        """The number of elements in the head's projection; the embedding has the same number."""
        return self.hidden * self.vocabulary
