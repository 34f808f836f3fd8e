"""Blocks become batches: tokens, and the labels that the loss is taken against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tasks.documents import State
from tasks.packing import Block

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """`tokens` and `labels` are int64 (rows, seq_length).

    `labels[r, t]` is the token that position t must predict, `tokens[r, t + 1]` where that is
    trained, else IGNORED; the last position's always is. `state` is the stream's after these
    blocks (empty for evaluation). `documents` says, for each row, where its text is from.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    state: State = field(default_factory=dict)
    documents: tuple[tuple[str, ...], ...] = ()


def make_batch(blocks: Sequence[Block], state: State | None = None) -> Batch:
    """One row a block."""
    tokens = np.stack([block.tokens for block in blocks])
    trained = np.stack([block.trained for block in blocks])
    labels = np.full_like(tokens, IGNORED)
    labels[:, :-1] = np.where(trained[:, 1:], tokens[:, 1:], IGNORED)
    documents = tuple(block.documents for block in blocks)
    return Batch(tokens, labels, state or {}, documents)
