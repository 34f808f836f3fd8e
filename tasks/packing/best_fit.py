"""Blocks that keep documents apart: each stands in one block whole, if it is not longer than one.

Documents are taken in groups of some blocks' tokens, and fitted into blocks there, the longest
first, each where it leaves the least room (best-fit decreasing, as Ding et al., Fewer Truncations
Improve Language Modeling, arXiv 2404.10830). What stays empty is padding. A document longer than a
block is cut into pieces, which are then as documents of their own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tasks.packing.blocks import TokenBlock, empty_block
from tasks.packing.concat import PackedSource
from tasks.tokenization.encoder import Encoded
from tasks.tokenization.prefetch import EncodedDocument, EncodedDocuments

GROUP_BLOCKS = 32


class _Piece(NamedTuple):
    """A document, or what of it stands in one block; `begins`: it is the document's first."""

    encoded: Encoded
    where: str
    begins: bool


class DocumentSource(PackedSource):
    """Documents apart; `used` counts the blocks of the group that is part-used."""

    def __init__(self, documents: EncodedDocuments, seq_length: int) -> None:
        super().__init__(documents, seq_length)
        self._group: deque[tuple[TokenBlock, int]] = deque()

    def _pack(self) -> TokenBlock:
        if not self._group:
            documents = self._read_group()
            self._before, self._used = documents[0].before, 0
            self._epoch = documents[-1].epoch
        block, begun = self._group.popleft()
        self._used += 1
        self._num_documents += begun
        return block

    def _read_group(self) -> list[EncodedDocument]:
        documents = []
        room = GROUP_BLOCKS * self._seq_length
        while room > 0:
            documents.append(self._documents.next())
            room -= len(documents[-1].encoded.tokens)
        texts = [(document.encoded, document.where) for document in documents]
        self._group = deque(_pack_group(texts, self._seq_length))
        return documents

    def _take_up(self, used: int) -> None:
        self._group.clear()
        self._used = used
        if not used:
            return
        self._read_group()
        if used > len(self._group):
            raise self._documents.source.empty_error("changed since the checkpoint")
        for _ in range(used):
            self._group.popleft()


def pack_apart_once(encoded: Iterable[Encoded], seq_length: int) -> Iterator[TokenBlock]:
    """Packs documents apart, once, as `tasks.packing.concat.pack_once` does end to end."""
    group: list[tuple[Encoded, str]] = []
    room = GROUP_BLOCKS * seq_length
    for document in encoded:
        group.append((document, ""))
        room -= len(document.tokens)
        if room <= 0:
            yield from _trained(group, seq_length)
            group, room = [], GROUP_BLOCKS * seq_length
    yield from _trained(group, seq_length)


def _trained(group: Sequence[tuple[Encoded, str]], seq_length: int) -> Iterator[TokenBlock]:
    for block, _ in _pack_group(group, seq_length):
        if block.predicted.any():
            yield replace(block, documents=())


def _pack_group(
    documents: Sequence[tuple[Encoded, str]], seq_length: int
) -> list[tuple[TokenBlock, int]]:
    """Blocks, in the order of their first documents, each with how many documents begin there."""
    pieces = [piece for encoded, where in documents for piece in _cut(encoded, where, seq_length)]
    fitted = fit([len(piece.encoded.tokens) for piece in pieces], seq_length)
    return [_block([pieces[index] for index in indices], seq_length) for indices in fitted]


def _cut(encoded: Encoded, where: str, seq_length: int) -> Iterator[_Piece]:
    for start in range(0, len(encoded.tokens), seq_length):
        here = slice(start, start + seq_length)
        part = Encoded(encoded.tokens[here], encoded.trained[here])
        yield _Piece(part, where, begins=start == 0)


def fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which of `lengths`, of 1 to `room` each, go together into bins of `room`.

    The longest go first, the first of equals before the others, each to the bin that it fills best.
    Bins hold indices in rising order, and stand in the order of their first.
    """
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room left and number of each bin, in rising order
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(left, (lengths[index], -1))
        if place < len(left):
            free, number = left.pop(place)
        else:
            free, number = room, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(left, (free - lengths[index], number))
    return sorted(sorted(indices) for indices in bins)


def _block(pieces: Sequence[_Piece], seq_length: int) -> tuple[TokenBlock, int]:
    block, begins = empty_block(seq_length), np.empty(seq_length, dtype=np.int64)
    filled = 0
    for piece in pieces:
        here = slice(filled, filled + len(piece.encoded.tokens))
        block.tokens[here], block.trained[here] = piece.encoded
        begins[here] = filled
        filled = here.stop
    begins[filled:] = filled
    documents = tuple(piece.where for piece in pieces)
    block = replace(block, documents=documents, padding=seq_length - filled, begins=begins)
    return block, sum(piece.begins for piece in pieces)
