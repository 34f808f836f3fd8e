"""Positions and lengths of the documents in packed rows, for attention and rotary embeddings.

Documents fill their rows without gaps, so the concatenated rows are the concatenated documents. A
"packed" tensor below has shape (rows * seq_len, ...).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modules.layers.rotary import Rotation


@dataclass(frozen=True, eq=False)
class PackedDocuments:
    """The documents in a microbatch's rows; each property is computed once for all layers.

    doc_starts: int64 (rows, seq_len) on the host: for each token, the position in the row at which
        the token's document starts.
    device: the device of the activations; the properties that are tensors are copied to it.
    """

    doc_starts: Tensor
    device: torch.device

    @cached_property
    def positions(self) -> Tensor:
        """The position of each token in its document, from 0: int64 (rows, seq_len)."""
        return self._to_device(self._row_positions - self.doc_starts)

    def place(self) -> None:
        """Computes all properties that are tensors, and copies them to the device."""
        for name in ("positions", "bounds", "by_length", "original_order"):
            getattr(self, name)

    def rotation(self, table: Rotation) -> Rotation:
        """Returns `table` at the documents' positions, computed once for all layers that use it."""
        if table not in self._rotations:
            self._rotations[table] = table.at(self.positions)
        return self._rotations[table]

    @cached_property
    def lengths_of_rows(self) -> list[list[int]]:
        """The lengths of each row's documents, in order."""
        return [_lengths(row).tolist() for row in self._is_first]

    @cached_property
    def longest(self) -> int:
        """The length of the longest document."""
        return int(self._packed_lengths.max())

    @cached_property
    def bounds(self) -> Tensor:
        """The start of each document in the packed tokens: int32 (documents + 1).

        The last element is the number of all packed tokens.
        """
        bounds = torch.zeros(len(self._packed_lengths) + 1, dtype=torch.int32)
        torch.cumsum(self._packed_lengths, 0, out=bounds[1:])
        return self._to_device(bounds)

    @cached_property
    def by_length(self) -> Tensor:
        """The indices that sort packed tokens by their document's length: int64 (rows * seq_len).

        The shortest documents come first. Documents of equal length keep their order.
        """
        return self._to_device(self._by_length)

    @cached_property
    def original_order(self) -> Tensor:
        """The inverse permutation of `by_length`: int64 (rows * seq_len)."""
        return self._to_device(self._by_length.argsort())

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """A pair (number of documents, length) for each length, the shortest length first."""
        lengths, counts = self._packed_lengths.unique(return_counts=True)
        return list(zip(counts.tolist(), lengths.tolist(), strict=True))

    @cached_property
    def _rotations(self) -> dict[Rotation, Rotation]:
        return {}

    @cached_property
    def _row_positions(self) -> Tensor:
        return torch.arange(self.doc_starts.shape[1])

    @cached_property
    def _is_first(self) -> Tensor:
        return self.doc_starts == self._row_positions

    @cached_property
    def _packed_lengths(self) -> Tensor:
        return _lengths(self._is_first.flatten())

    @cached_property
    def _by_length(self) -> Tensor:
        lengths = self._packed_lengths
        return lengths.repeat_interleave(lengths).argsort(stable=True)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copies `tensor` to the device; the host does not wait for work on the device.

        From memory that is not pinned, CUDA may wait for earlier work of the stream before it
        copies. torch keeps pinned memory until the copy is complete, and then uses it again. To
        allocate pinned memory can take until the device has finished all work, so `place` must be
        called before a receive is posted.
        """
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def _lengths(is_first: Tensor) -> Tensor:
    """Returns the lengths of the documents; `is_first` (tokens) marks their first tokens."""
    starts = is_first.nonzero().flatten()
    return starts.diff(append=starts.new_tensor([len(is_first)]))
