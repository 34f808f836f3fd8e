"""Packing of complete documents into blocks: a document is cut only if it is longer than a block.

Documents are read in groups that fill about GROUP_BLOCKS blocks. A group is packed by best-fit
decreasing: the longest document is placed first, and each document goes into the block with the
least free space that is enough (Ding et al., Fewer Truncations Improve Language Modeling, arXiv
2404.10830). The rest of a block is padding. A document longer than a block is cut into segments,
which are packed like documents.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tasks.packing.blocks import TokenBlock, empty_block
from tasks.packing.concat import Packer
from tasks.tokenization.encoder import EncodedDocument
from tasks.tokenization.prefetch import DocumentPrefetcher

GROUP_BLOCKS = 32


class _Segment(NamedTuple):
    """A complete document, or a piece of a document that is longer than a block."""

    encoded: EncodedDocument
    origin: str


class BestFitPacker(Packer):
    """A packer of complete documents; `used` in its state counts blocks taken from its group."""

    def __init__(self, documents: DocumentPrefetcher, seq_len: int) -> None:
        super().__init__(documents, seq_len)
        self._group: deque[TokenBlock] = deque()

    def _pack(self) -> TokenBlock:
        if not self._group:
            self._read_group()
            self._used = 0
        self._used += 1
        return self._group.popleft()

    def _read_group(self) -> None:
        documents = []
        space = GROUP_BLOCKS * self._seq_len
        while space > 0:
            documents.append(self._documents.next())
            space -= len(documents[-1].encoded.token_ids)
        self._state_before, self._epoch = documents[0].state_before, documents[-1].epoch
        segments = [_Segment(document.encoded, document.origin) for document in documents]
        self._group = deque(_pack_group(segments, self._seq_len))

    def _reread(self) -> None:
        self._group.clear()
        if not self._used:
            return
        self._read_group()
        if self._used > len(self._group):
            raise self._documents.source.changed_error("its documents are shorter than they were")
        for _ in range(self._used):
            self._group.popleft()


def pack_best_fit(documents: Iterable[EncodedDocument], seq_len: int) -> Iterator[TokenBlock]:
    """Yields the blocks of `documents`, packed in groups; skips blocks that train no token."""
    group: list[_Segment] = []
    space = GROUP_BLOCKS * seq_len
    for document in documents:
        group.append(_Segment(document, ""))
        space -= len(document.token_ids)
        if space <= 0:
            yield from _trained_blocks(group, seq_len)
            group, space = [], GROUP_BLOCKS * seq_len
    yield from _trained_blocks(group, seq_len)


def _trained_blocks(group: Sequence[_Segment], seq_len: int) -> Iterator[TokenBlock]:
    for block in _pack_group(group, seq_len):
        if block.predicted.any():
            yield replace(block, documents=())


def _pack_group(documents: Sequence[_Segment], seq_len: int) -> list[TokenBlock]:
    """Returns the blocks of a group, in the order of their first documents."""
    segments = [segment for document in documents for segment in _cut(document, seq_len)]
    bins = fit([len(segment.encoded.token_ids) for segment in segments], seq_len)
    return [_make_block([segments[index] for index in indices], seq_len) for indices in bins]


def _cut(document: _Segment, seq_len: int) -> Iterator[_Segment]:
    token_ids, trained = document.encoded
    for start in range(0, len(token_ids), seq_len):
        part = slice(start, start + seq_len)
        yield _Segment(EncodedDocument(token_ids[part], trained[part]), document.origin)


def fit(lengths: Sequence[int], bin_size: int) -> list[list[int]]:
    """Distributes `lengths` over bins; returns, for each bin, the indices of the lengths in it.

    Each length is from 1 to `bin_size`, and the lengths in a bin sum to at most `bin_size`. The
    largest length is placed first, and each length goes into the bin with the least space that is
    enough; of equal lengths, the one with the lower index is placed first. The bins are sorted by
    their first index, and the indices in a bin are sorted.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free space, number) of each bin, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        position = bisect_left(free, (lengths[index], -1))
        if position < len(free):
            space, number = free.pop(position)
        else:
            space, number = bin_size, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(free, (space - lengths[index], number))
    return sorted(sorted(indices) for indices in bins)


def _make_block(segments: Sequence[_Segment], seq_len: int) -> TokenBlock:
    block, doc_starts = empty_block(seq_len), np.empty(seq_len, dtype=np.int64)
    filled = 0
    for segment in segments:
        target = slice(filled, filled + len(segment.encoded.token_ids))
        block.token_ids[target], block.trained[target] = segment.encoded
        doc_starts[target] = filled
        filled = target.stop
    doc_starts[filled:] = filled
    origins = tuple(segment.origin for segment in segments)
    return replace(block, documents=origins, padding=seq_len - filled, doc_starts=doc_starts)
