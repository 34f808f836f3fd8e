"""Blocks become batches: tokens, and the labels that the loss is taken against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tasks.packing.blocks import Block
from tasks.shuffling.buffered import State

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


def make_batch(blocks: Sequence[Block], state: State | None = None) -> Batch:
    """One row a block."""
    tokens = np.stack([block.tokens for block in blocks])
    predicted = np.stack([block.predicted for block in blocks])
    labels = np.full_like(tokens, IGNORED)
    labels[:, :-1] = np.where(predicted[:, 1:], tokens[:, 1:], IGNORED)
    documents = tuple(block.documents for block in blocks)
    return Batch(tokens, labels, state or {}, documents, _begins(blocks))


def _begins(blocks: Sequence[Block]) -> NDArray[np.int64] | None:
    found = [block.begins for block in blocks if block.begins is not None]
    assert len(found) in (0, len(blocks)), "one stream's blocks are packed in one way"
    return np.stack(found) if found else None
