"""Blocks of tokens, and batches of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modules.layers.lm_head import IGNORED
from tasks.sources.base import State


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """A sequence of tokens from one or several documents.

    token_ids: int64 (seq_len,).
    trained: bool (seq_len,), true for tokens that the model learns to predict.
    documents: the origins of the documents ("file:line"), in order; empty in evaluation.
    padding: the number of tokens at the end that belong to no document; these tokens are 0 and are
        not trained.
    doc_starts: int64 (seq_len,), for each token the index of its document's first token; padding
        counts as a document. None if the model treats the block as one document.
    """

    token_ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    documents: tuple[str, ...] = ()
    padding: int = 0
    doc_starts: NDArray[np.int64] | None = None

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Returns a mask of the trained tokens except the first token of each document.

        If `doc_starts` is None, the block counts as one document.
        """
        indices = np.arange(len(self.token_ids))
        return self.trained & (indices > (0 if self.doc_starts is None else self.doc_starts))


def empty_block(seq_len: int) -> TokenBlock:
    """Returns a block that has only padding."""
    token_ids = np.zeros(seq_len, dtype=np.int64)
    return TokenBlock(token_ids, np.zeros(seq_len, dtype=np.bool_), padding=seq_len)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """A batch of blocks; each block is a row of the arrays.

    token_ids: int64 (rows, seq_len).
    labels: int64 (rows, seq_len), the token that each position predicts: the next token if
        `TokenBlock.predicted` is true for it, else IGNORED. The last position is always IGNORED.
    state: the state of the stream after these blocks; empty for evaluation.
    documents: the origins of each row's documents.
    doc_starts: int64 (rows, seq_len), the blocks' `TokenBlock.doc_starts`; None if those are None.
    """

    token_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    state: State = field(default_factory=dict)
    documents: tuple[tuple[str, ...], ...] = ()
    doc_starts: NDArray[np.int64] | None = None


def make_batch(blocks: Sequence[TokenBlock], state: State | None = None) -> TokenBatch:
    """Returns a batch with a row for each block."""
    token_ids = np.stack([block.token_ids for block in blocks])
    predicted = np.stack([block.predicted for block in blocks])
    labels = np.full_like(token_ids, IGNORED)
    labels[:, :-1] = np.where(predicted[:, 1:], token_ids[:, 1:], IGNORED)
    documents = tuple(block.documents for block in blocks)
    doc_starts = [block.doc_starts for block in blocks if block.doc_starts is not None]
    assert len(doc_starts) in (0, len(blocks)), "the blocks of a stream are packed alike"
    stacked = np.stack(doc_starts) if doc_starts else None
    return TokenBatch(token_ids, labels, state or {}, documents, stacked)
