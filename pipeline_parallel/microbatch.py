"""A pipeline's batch, cut into microbatches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.attention.packed_documents import PackedDocuments
from modules.layers.dropout import Keys
from modules.layers.lm_head import IGNORED


class PipelineBatch:
    """The rows of one pipeline in one iteration, cut into microbatches.

    Args:
        token_ids: (rows, seq_len); None unless the stage is the first.
        labels: (rows, seq_len); None unless the stage is the last.
        keys: a number for each row, from which the row's dropout masks are drawn.
        micro_rows: the number of rows in a microbatch.
        doc_starts: (rows, seq_len), in host memory. For each token, the position in the row at
            which the token's document begins. None if attention crosses documents.
    """

    def __init__(
        self,
        token_ids: Tensor | None,
        labels: Tensor | None,
        keys: Sequence[int],
        micro_rows: int,
        doc_starts: Tensor | None = None,
    ) -> None:
        self._token_ids, self._labels, self._keys = token_ids, labels, keys
        self._micro_rows, self._doc_starts = micro_rows, doc_starts
        self._placed: dict[int, PackedDocuments] = {}

    def token_ids(self, microbatch: int) -> Tensor | None:
        """Returns the token ids of a microbatch; None unless the stage is the first."""
        return None if self._token_ids is None else self._token_ids[self._span(microbatch)]

    def labels(self, microbatch: int) -> Tensor | None:
        """Returns the labels of a microbatch; None unless the stage is the last."""
        return None if self._labels is None else self._labels[self._span(microbatch)]

    def keys(self, microbatch: int) -> Keys:
        """Returns the dropout keys of a microbatch, one for each row."""
        return self._keys[self._span(microbatch)]

    def place_documents(self, device: torch.device) -> None:
        """Copies the documents of all microbatches to a GPU; does nothing for a CPU.

        The copies need pinned memory, whose allocation can wait for all work of the GPU. Therefore
        the engine calls this before it posts the first receive of an iteration.
        """
        if self._doc_starts is None or device.type != "cuda":
            return
        for microbatch in range(len(self._doc_starts) // self._micro_rows):
            documents = self.documents(microbatch, device)
            assert documents is not None
            documents.place()
            self._placed[microbatch] = documents

    def documents(self, microbatch: int, device: torch.device) -> PackedDocuments | None:
        """Returns the documents of a microbatch; None if attention crosses documents."""
        if self._doc_starts is None:
            return None
        placed = self._placed.pop(microbatch, None)  # its memory is free after the microbatch
        if placed is not None:
            return placed
        return PackedDocuments(self._doc_starts[self._span(microbatch)], device)

    def num_trained_tokens(self) -> int:
        """Returns the number of trained tokens in the batch; 0 unless the stage is the last."""
        return 0 if self._labels is None else int((self._labels != IGNORED).sum())

    def _span(self, microbatch: int) -> slice:
        return slice(microbatch * self._micro_rows, (microbatch + 1) * self._micro_rows)
