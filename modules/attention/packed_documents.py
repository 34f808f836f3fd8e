"""Where the documents of some rows lie, for attention and positions that stay inside a document.

Documents fill their rows, so the rows put one after another are all documents one after another:
that is what `packed` means below, of tensors (rows * tokens, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedDocuments:
    """The documents of a microbatch's rows; made once for all blocks, forward and backward.

    begins: int64 (rows, tokens) on the host: where in its row the document of each token begins.
    device: of what the tokens are computed with; what blocks need is there.
    """

    begins: Tensor
    device: torch.device

    @cached_property
    def positions(self) -> Tensor:
        """int64 (rows, tokens): of each token in its document, from 0."""
        return self._place(self._places - self.begins)

    @cached_property
    def lengths_of_rows(self) -> list[list[int]]:
        """The number of tokens of each row's documents, in order."""
        return [_distances(row).tolist() for row in self._is_first]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self._lengths.max())

    @cached_property
    def bounds(self) -> Tensor:
        """int32 (documents + 1): where each document begins among packed tokens, and the end."""
        bounds = torch.zeros(len(self._lengths) + 1, dtype=torch.int32)
        torch.cumsum(self._lengths, 0, out=bounds[1:])
        return self._place(bounds)

    @cached_property
    def by_length(self) -> Tensor:
        """int64 (rows * tokens): which packed token comes where when the documents are sorted by
        their length, the shortest first; those of one length stay in order."""
        return self._place(self._by_length)

    @cached_property
    def back_in_place(self) -> Tensor:
        """int64 (rows * tokens): undoes `by_length`."""
        return self._place(self._by_length.argsort())

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """For each length that documents have, from the shortest: how many have it, and it."""
        lengths, counts = self._lengths.unique(return_counts=True)
        return list(zip(counts.tolist(), lengths.tolist(), strict=True))

    @cached_property
    def _places(self) -> Tensor:
        return torch.arange(self.begins.shape[1])

    @cached_property
    def _is_first(self) -> Tensor:
        return self.begins == self._places

    @cached_property
    def _lengths(self) -> Tensor:
        """Of all documents, packed."""
        return _distances(self._is_first.flatten())

    @cached_property
    def _by_length(self) -> Tensor:
        return self._lengths.repeat_interleave(self._lengths).argsort(stable=True)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)  # no wait for what the device still does


def _distances(is_first: Tensor) -> Tensor:
    """From each place that is true to the next one or the end; the first place is."""
    places = is_first.nonzero().flatten()
    return places.diff(append=places.new_tensor([len(is_first)]))
