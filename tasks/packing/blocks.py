"""A block of tokens: what a row of a batch is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Block:
    """`tokens` is int64 (seq_length,); `trained[t]`, bool, says whether token t is to be predicted.

    The first token of a block is never predicted, whatever `trained` says. `documents` is where its
    text is from ("file:line"), in order; evaluation leaves it out. The last `padding` tokens are 0,
    no document's and not trained.

    begins: int64 (seq_length,), the place in the block of the first token of token t's document,
    where documents are kept apart: that first token is not predicted either. Padding is as a
    document. None: documents are not kept apart.
    """

    tokens: NDArray[np.int64]
    trained: NDArray[np.bool_]
    documents: tuple[str, ...] = ()
    padding: int = 0
    begins: NDArray[np.int64] | None = None

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """bool (seq_length,): which tokens are trained and follow one of their document."""
        places = np.arange(len(self.tokens))
        return self.trained & (places > (0 if self.begins is None else self.begins))


def empty_block(seq_length: int) -> Block:
    """A block of padding alone."""
    tokens = np.zeros(seq_length, dtype=np.int64)
    return Block(tokens, np.zeros(seq_length, dtype=np.bool_), padding=seq_length)
