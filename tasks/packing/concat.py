"""Packing of documents into blocks, one document directly after another.

Every block is full. If a document does not fit, its rest is at the start of the next block.
`tasks.packing.best_fit` packs complete documents instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tasks.packing.blocks import TokenBlock, empty_block
from tasks.sources.base import State
from tasks.tokenization.encoder import EncodedDocument
from tasks.tokenization.prefetch import DocumentPrefetcher, PrefetchedDocument


class Packer(ABC):
    """An endless sequence of blocks from one source.

    In the dict that `state` returns, `documents` is the state of the source before the current
    document, and `used` is the number of tokens of this document that are already in blocks. A
    packer of complete documents reads groups of documents: in its dict, `documents` is the state of
    the source before the current group, and `used` is the number of used blocks of this group.
    """

    def __init__(self, documents: DocumentPrefetcher, seq_len: int) -> None:
        self._documents, self._seq_len = documents, seq_len
        self._state_before = documents.state()
        self._used = self._epoch = 0

    def next_block(self) -> TokenBlock:
        """Returns the next block with a trained token; raises ValueError if there is none."""
        first_skipped: int | None = None  # the epoch of the first block that is skipped
        while not (block := self._pack()).predicted.any():
            first_skipped = self._epoch if first_skipped is None else first_skipped
            if self._epoch > first_skipped + 1:
                raise self._documents.source.error(
                    f"yields no token to train (--train-on {self._documents.train_on})"
                )
        return block

    @abstractmethod
    def _pack(self) -> TokenBlock:
        """Returns the next block, with or without trained tokens."""

    def state(self) -> State:
        """Returns the state from which `restore` continues with the next block."""
        return {"documents": self._state_before, "used": self._used, "epoch": self._epoch}

    def restore(self, state: State) -> None:
        """Restores what the method `state` returned; raises ValueError if files have changed."""
        self._documents.restore(state["documents"])
        self._state_before = state["documents"]
        self._used = state["used"]
        self._reread()
        self._epoch = state["epoch"]

    @abstractmethod
    def _reread(self) -> None:
        """Reads again the documents that are partly used, and skips the part that `_used` counts.

        The source must be in the state before these documents.
        """


class ConcatPacker(Packer):
    """A packer that fills every block; `used` counts the used tokens of the current document."""

    def __init__(self, documents: DocumentPrefetcher, seq_len: int) -> None:
        super().__init__(documents, seq_len)
        self._document: PrefetchedDocument | None = None

    def _pack(self) -> TokenBlock:
        block = empty_block(self._seq_len)
        origins: list[str] = []
        filled = 0
        while filled < self._seq_len:
            document = self._unfinished_document()
            if not origins or origins[-1] != document.origin:
                origins.append(document.origin)
            copied = _copy_tokens(document.encoded, self._used, block, filled)
            filled, self._used = filled + copied, self._used + copied
        return replace(block, documents=tuple(origins), padding=0)

    def _unfinished_document(self) -> PrefetchedDocument:
        if self._document is None or self._used == len(self._document.encoded.token_ids):
            self._document, self._used = self._documents.next(), 0
            self._state_before, self._epoch = self._document.state_before, self._document.epoch
        return self._document

    def _reread(self) -> None:
        self._document = self._documents.next() if self._used else None
        if self._document is not None and self._used > len(self._document.encoded.token_ids):
            raise self._documents.source.changed_error("a document is shorter than it was")


def _copy_tokens(document: EncodedDocument, used: int, block: TokenBlock, filled: int) -> int:
    """Copies unused tokens of a document into the free space of a block; returns their number."""
    count = min(len(document.token_ids) - used, len(block.token_ids) - filled)
    target, source = slice(filled, filled + count), slice(used, used + count)
    block.token_ids[target] = document.token_ids[source]
    block.trained[target] = document.trained[source]
    return count


def pack_concat(documents: Iterable[EncodedDocument], seq_len: int) -> Iterator[TokenBlock]:
    """Yields the blocks of `documents`; skips blocks without trained token; pads the last block."""
    return (block for block in _fill_blocks(documents, seq_len) if block.predicted.any())


def _fill_blocks(documents: Iterable[EncodedDocument], seq_len: int) -> Iterator[TokenBlock]:
    block, filled = empty_block(seq_len), 0
    for document in documents:
        used = 0
        while used < len(document.token_ids):
            copied = _copy_tokens(document, used, block, filled)
            used, filled = used + copied, filled + copied
            if filled == seq_len:
                yield replace(block, padding=0)
                block, filled = empty_block(seq_len), 0
    yield replace(block, padding=seq_len - filled)
