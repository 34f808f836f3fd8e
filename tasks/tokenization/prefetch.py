"""A source's documents as tokens, in the source's order, read and tokenized ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tasks.shuffled import Shuffled
from tasks.sources.base import BadLineError, Document, Source, State
from tasks.tokenization.encoder import NOTHING, Encoded, TrainOn
from tasks.tokenization.workers import Results, Workers

BATCH_CHARACTERS = 1 << 19  # of the documents that are tokenized at once, or one more document
BATCH_DOCUMENTS = 1024


class EncodedDocument(NamedTuple):
    """`encoded` is a document at `where`, of `epoch`; the source's state was `before` it."""

    encoded: Encoded
    where: str
    before: State
    epoch: int


class _Read(NamedTuple):
    document: Document
    before: State
    epoch: int


class _Batch(NamedTuple):
    """Documents that were read, their tokens to come, and what reading the next one raised."""

    documents: list[_Read]
    results: Callable[[], Results]
    error: Exception | None


class EncodedDocuments:
    """The documents of a source that have any token, without end."""

    def __init__(self, documents: Shuffled, workers: Workers, train_on: TrainOn) -> None:
        self._documents, self._workers, self._train_on = documents, workers, train_on
        self._last_fruitful_epoch = -1
        self._begin()

    def _begin(self) -> None:
        self._ahead: deque[_Batch] = deque()
        self._failed = False
        self._items = self._all()

    @property
    def source(self) -> Source:
        return self._documents.source

    @property
    def train_on(self) -> TrainOn:
        return self._train_on

    def next(self) -> EncodedDocument:
        """The next document.

        Raises:
            ValueError: A line is no document, or a whole epoch yields no token.
        """
        while True:
            item = next(self._items)
            if len(item.encoded.tokens):
                self._last_fruitful_epoch = item.epoch
                return item
            if item.epoch > self._last_fruitful_epoch + 1:
                raise self.source.empty_error("yields no token")

    def state(self) -> State:
        """The source's, where nothing was read of it yet: at the start, and after `restore`."""
        return self._documents.state()

    def restore(self, state: State) -> None:
        """Goes to before a document, whose `before` is `state`.

        Raises:
            ValueError: The source is not the one that the state was taken from.
        """
        self._documents.restore(state)
        self._last_fruitful_epoch = self._documents.epoch
        self._begin()

    def _all(self) -> Iterator[EncodedDocument]:
        while True:
            while len(self._ahead) <= self._workers.depth and not self._failed:
                self._ahead.append(self._read())
            batch = self._ahead.popleft()
            for read, encoded in zip(batch.documents, batch.results(), strict=True):
                if isinstance(encoded, BadLineError):
                    self._documents.bad_lines.take(encoded, noted=True)
                    encoded = NOTHING
                yield EncodedDocument(encoded, read.document.where, read.before, read.epoch)
            if batch.error is not None:
                raise batch.error

    def _read(self) -> _Batch:
        found: list[_Read] = []
        size, error = 0, None
        while len(found) < BATCH_DOCUMENTS and size < BATCH_CHARACTERS:
            before = self._documents.state()
            try:
                document = self._documents.next()
            except Exception as caught:  # raised where its document's turn would come
                error, self._failed = caught, True
                break
            found.append(_Read(document, before, self._documents.epoch))
            size += _characters(document)
        return _Batch(found, self._workers.encode([read.document for read in found]), error)


def _characters(document: Document) -> int:
    if document.messages is None:
        return len(document.text)
    return sum(len(message.content) for message in document.messages)
