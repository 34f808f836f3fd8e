"""A pipeline's batch, cut into microbatches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.attention.packed_documents import PackedDocuments
from modules.layers.dropout import Keys
from modules.layers.lm_head import IGNORED


class PipelineBatch:
    """One pipeline's rows of one iteration, cut into microbatches.

    `tokens` (rows, tokens) is there on the first stage, `labels` (rows, tokens) on the last;
    `keys` are the dropout keys of the rows, and `rows` how many a microbatch has. `doc_starts`
    (rows, tokens), on the host of every stage, is the index in its row of the first token of each
    token's document; None where documents are not kept apart.
    """

    def __init__(
        self,
        tokens: Tensor | None,
        labels: Tensor | None,
        keys: Sequence[int],
        rows: int,
        doc_starts: Tensor | None = None,
    ) -> None:
        self._tokens, self._labels, self._keys, self._rows = tokens, labels, keys, rows
        self._doc_starts = doc_starts

    def tokens(self, microbatch: int) -> Tensor | None:
        return None if self._tokens is None else self._tokens[self._span(microbatch)]

    def labels(self, microbatch: int) -> Tensor | None:
        return None if self._labels is None else self._labels[self._span(microbatch)]

    def keys(self, microbatch: int) -> Keys:
        return self._keys[self._span(microbatch)]

    def documents(self, microbatch: int, device: torch.device) -> PackedDocuments | None:
        if self._doc_starts is None:
            return None
        return PackedDocuments(self._doc_starts[self._span(microbatch)], device)

    def num_trained(self) -> int:
        """Tokens that are predicted, as the last stage sees them; 0 elsewhere."""
        return 0 if self._labels is None else int((self._labels != IGNORED).sum())

    def _span(self, microbatch: int) -> slice:
        return slice(microbatch * self._rows, (microbatch + 1) * self._rows)
