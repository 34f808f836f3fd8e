"""Long texts in pieces: a tokenizer takes some hundred bytes of memory for each byte of a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

PIECE = 1 << 20  # characters
BATCH = 1 << 22  # characters that are tokenized at once
_GAP = re.compile(r"(?<=\S) (?=[^\W\d_])")  # one space between a word and a letter
_SEARCH = 1 << 14


def are_short(texts: Sequence[str]) -> bool:
    """Whether all of them together are no more than a piece."""
    return sum(map(len, texts)) <= PIECE


def cut(text: str) -> list[str]:
    """`text` in pieces of up to PIECE characters, each but the first from a space on.

    Byte-level tokenizers, which are those of GPT-J and GPT-NeoX, never join what is on both sides
    of such a space: the tokens are those of the whole. Where none is near, the cut is anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE:
        limit = start + PIECE
        gaps = list(_GAP.finditer(text, limit - _SEARCH, limit))
        end = gaps[-1].start() if gaps else limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def in_batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Lists of pieces of BATCH characters in all, or a piece more."""
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
