"""A block of tokens: what a row of a batch is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tasks.sources.base import State


@dataclass(frozen=True, eq=False)
class TokenBlock:
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


def empty_block(seq_length: int) -> TokenBlock:
    """A block of padding alone."""
    tokens = np.zeros(seq_length, dtype=np.int64)
    return TokenBlock(tokens, np.zeros(seq_length, dtype=np.bool_), padding=seq_length)


IGNORED = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """`tokens` and `labels` are int64 (rows, seq_length).

    `labels[r, t]` is the token that position t must predict, `tokens[r, t + 1]` where that is
    trained, else IGNORED; the last position's always is. `state` is the stream's after these
    blocks (empty for evaluation). `documents` says, for each row, where its text is from.
    `begins`, of the same shape, is the blocks' (see `tasks.packing.blocks`); None where documents
    are not kept apart.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    state: State = field(default_factory=dict)
    documents: tuple[tuple[str, ...], ...] = ()
    begins: NDArray[np.int64] | None = None


def make_batch(blocks: Sequence[TokenBlock], state: State | None = None) -> Batch:
    """One row a block."""
    tokens = np.stack([block.tokens for block in blocks])
    predicted = np.stack([block.predicted for block in blocks])
    labels = np.full_like(tokens, IGNORED)
    labels[:, :-1] = np.where(predicted[:, 1:], tokens[:, 1:], IGNORED)
    documents = tuple(block.documents for block in blocks)
    return Batch(tokens, labels, state or {}, documents, _begins(blocks))


def _begins(blocks: Sequence[TokenBlock]) -> NDArray[np.int64] | None:
    found = [block.begins for block in blocks if block.begins is not None]
    assert len(found) in (0, len(blocks)), "one stream's blocks are packed in one way"
    return np.stack(found) if found else None
