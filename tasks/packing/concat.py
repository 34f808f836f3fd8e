"""Blocks of one source: what packs them, and documents packed end to end.

A block is filled to the last token; what a document has left opens the next block. For blocks that
keep documents apart see `tasks.packing.best_fit`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tasks.packing.blocks import TokenBlock, empty_block
from tasks.sources.base import State
from tasks.tokenization.encoder import Encoded
from tasks.tokenization.prefetch import EncodedDocument, EncodedDocuments


class PackedSource(ABC):
    """The blocks of one source, without end.

    The state is the documents' before some document, and how much was `used` from there on.
    """

    def __init__(self, documents: EncodedDocuments, seq_length: int) -> None:
        self._documents, self._seq_length = documents, seq_length
        self._before = documents.state()
        self._used = self._epoch = self._num_documents = self._num_blocks = 0

    def next_block(self) -> TokenBlock:
        """The next block that trains any token; those that train none are passed over.

        Raises:
            ValueError: A line is no document, or a whole epoch yields no token to train.
        """
        passed_over_in: int | None = None
        while not (block := self._pack()).predicted.any():
            passed_over_in = self._epoch if passed_over_in is None else passed_over_in
            if self._epoch > passed_over_in + 1:
                raise self._documents.source.empty_error(
                    f"yields no token to train (--train-on {self._documents.train_on})"
                )
        self._num_blocks += 1
        return block

    @abstractmethod
    def _pack(self) -> TokenBlock:
        """The next block, whatever it trains."""

    def _next_document(self) -> EncodedDocument:
        found = self._documents.next()
        self._epoch = found.epoch
        self._num_documents += 1
        return found

    def state(self) -> State:
        """What `restore` needs to go on with the next block."""
        return {
            "documents": self._before,
            "used": self._used,
            "num_documents": self._num_documents,
            "num_blocks": self._num_blocks,
            "epoch": self._epoch,
        }

    def restore(self, state: State) -> None:
        """Goes to where `state` was taken, reading again what was in use there.

        Raises:
            ValueError: The source is not the one that the state was taken from.
        """
        self._documents.restore(state["documents"])
        self._before = state["documents"]
        self._take_up(state["used"])
        self._num_documents, self._num_blocks = state["num_documents"], state["num_blocks"]
        self._epoch = state["epoch"]

    @abstractmethod
    def _take_up(self, used: int) -> None:
        """Goes on after what was `used` from `_before` on, where the documents stand."""


class ConcatenatedSource(PackedSource):
    """Documents end to end; `used` counts the tokens of the document that is part-used."""

    def __init__(self, documents: EncodedDocuments, seq_length: int) -> None:
        super().__init__(documents, seq_length)
        self._document: EncodedDocument | None = None

    def _pack(self) -> TokenBlock:
        block = empty_block(self._seq_length)
        documents: list[str] = []
        filled = 0
        while filled < self._seq_length:
            document = self._with_some_left()
            if not documents or documents[-1] != document.where:
                documents.append(document.where)
            copied = _copy(document.encoded, self._used, block, filled)
            filled, self._used = filled + copied, self._used + copied
        return replace(block, documents=tuple(documents), padding=0)

    def _with_some_left(self) -> EncodedDocument:
        if self._document is None or self._used == len(self._document.encoded.tokens):
            self._document, self._used = self._next_document(), 0
            self._before = self._document.before
        return self._document

    def _take_up(self, used: int) -> None:
        self._document, self._used = None, used
        if not used:
            return
        self._document = self._documents.next()
        if used > len(self._document.encoded.tokens):
            raise self._documents.source.empty_error("changed since the checkpoint")


def _copy(encoded: Encoded, used: int, block: TokenBlock, filled: int) -> int:
    """What of a document is not used yet, to the block as far as there is room: how much."""
    count = min(len(encoded.tokens) - used, len(block.tokens) - filled)
    here, there = slice(filled, filled + count), slice(used, used + count)
    block.tokens[here], block.trained[here] = encoded.tokens[there], encoded.trained[there]
    return count


def pack_once(encoded: Iterable[Encoded], seq_length: int) -> Iterator[TokenBlock]:
    """Packs documents in order, once; the last block is padded.

    Blocks that train no token are left out.
    """
    for block in _pack_all(encoded, seq_length):
        if block.predicted.any():
            yield block


def _pack_all(documents: Iterable[Encoded], seq_length: int) -> Iterator[TokenBlock]:
    block, filled = empty_block(seq_length), 0
    for encoded in documents:
        used = 0
        while used < len(encoded.tokens):
            copied = _copy(encoded, used, block, filled)
            used, filled = used + copied, filled + copied
            if filled == seq_length:
                yield replace(block, padding=0)
                block, filled = empty_block(seq_length), 0
    yield replace(block, padding=seq_length - filled)
