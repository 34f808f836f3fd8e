"""The sizes of a model that its speed depends on, and its work in multiply-adds. Needs no torch.

Multiply-adds of a forward pass per token are a function of the config and the sequence length
alone, in integers, so the same command gives the same numbers on every machine. Norms, activations
and rotations are not counted.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ModuleWork:
    """Multiply-adds per token of a block and of the head; the embedding, a lookup, has none."""

    block: int
    head: int


class ModelSizes(NamedTuple):
    """The sizes of a model; its family reads them from the config.

    hidden: the width of activations. inner: the width of the feed-forward part.
    block_weights: elements of a block's matrices, each of which multiplies every token once.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    block_weights: int

    def work(self, seq_len: int) -> ModuleWork:
        """Returns the work per token in sequences of `seq_len` tokens.

        Attention multiplies each token twice, for scores and values, by `hidden` numbers of every
        key up to its own: (seq_len + 1) / 2 keys on average. (A kernel may also compute the causal
        mask's other half, which is waste.)
        """
        attention = self.hidden * (seq_len + 1)
        return ModuleWork(self.block_weights + attention, self.head_weights)

    @property
    def head_weights(self) -> int:
        """Elements of the projection onto the vocabulary, and of the embedding."""
        return self.hidden * self.vocabulary
