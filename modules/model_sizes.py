"""The sizes of a model, and its work in multiply-adds. This module needs no torch.

The multiply-adds of a forward pass per token depend only on the config and the sequence length.
They are integers, so a command gives the same numbers on every machine. Norms, activations and
rotations are not counted.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ModuleWork:
    """The multiply-adds per token of a block and of the head; the embedding needs none.

    If blocks differ, `block` is their mean.
    """

    block: int
    head: int


class ModelSizes(NamedTuple):
    """The sizes of a model; its family reads the sizes from the config.

    hidden: the width of activations. inner: the width of the feed-forward part.
    block_weights: the number of elements in a block's matrices. Each element needs one multiply-add
        per token.
    heads, head_size: the number of query heads, and their width.
    window: in some blocks a query sees only so many of the last keys; 0 if no block has a window.
    window_layers: the number of these blocks.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    block_weights: int
    heads: int
    head_size: int
    window: int = 0
    window_layers: int = 0

    def work(self, seq_len: int) -> ModuleWork:
        """Returns the multiply-adds per token in sequences of `seq_len` tokens.

        In attention a token needs heads * head_size multiply-adds for scores, and as many for
        values, for every key that it sees. Without a window these are the keys up to its own
        position: (seq_len + 1) / 2 on average. (Some kernels also compute masked scores; this is
        not counted.)
        """
        full_layers = self.layers - self.window_layers
        width, window = 2 * self.heads * self.head_size, min(self.window, seq_len)
        all_keys = full_layers * _num_keys(seq_len)
        if self.window_layers:
            all_keys += self.window_layers * (_num_keys(window) + (seq_len - window) * window)
        attention = width * all_keys // (seq_len * self.layers)
        return ModuleWork(self.block_weights + attention, self.head_weights)

    def multiply_adds(self, seq_len: int) -> int:
        """Returns the multiply-adds per token of a forward pass through the complete model."""
        work = self.work(seq_len)
        return self.layers * work.block + work.head

    @property
    def head_weights(self) -> int:
        """The number of elements in the head's projection; the embedding has the same number."""
        return self.hidden * self.vocabulary


def _num_keys(seq_len: int) -> int:
    """Returns the number of keys that all queries of a sequence see together without a window."""
    return seq_len * (seq_len + 1) // 2
