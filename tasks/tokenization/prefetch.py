"""A prefetcher that reads and encodes the documents of a source before they are needed."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tasks.shuffling.shuffle import Shuffle
from tasks.sources.base import BadLineError, DataSource, Document, State
from tasks.tokenization.encoder import EMPTY, EncodedDocument, Results, TrainOn
from tasks.tokenization.workers import Workers

BATCH_CHARACTERS = 1 << 19  # documents are encoded together until they have this many characters
BATCH_DOCUMENTS = 1024


class PrefetchedDocument(NamedTuple):
    """An encoded document, its origin and epoch, and the source's state before the document."""

    encoded: EncodedDocument
    origin: str
    state_before: State
    epoch: int


class _PendingBatch(NamedTuple):
    """A batch of documents that workers encode; `encoded` of each document is still EMPTY.

    results: a function that waits for the encoded documents and returns them.
    error: the error that occurred when the document after this batch was read; else None.
    """

    documents: list[PrefetchedDocument]
    results: Callable[[], Results]
    error: Exception | None


class DocumentPrefetcher:
    """An endless sequence of the encoded documents of a source, without empty documents."""

    def __init__(self, documents: Shuffle, workers: Workers, train_on: TrainOn) -> None:
        self._documents, self._workers, self.train_on = documents, workers, train_on
        self._last_productive_epoch = -1
        self._begin()

    def _begin(self) -> None:
        self._pending: deque[_PendingBatch] = deque()
        self._has_failed = False
        self._encoded = self._encode()

    @property
    def source(self) -> DataSource:
        """The source of the documents."""
        return self._documents.source

    def next(self) -> PrefetchedDocument:
        """Returns the next document; raises ValueError for a bad line or an epoch with no token."""
        while True:
            document = next(self._encoded)
            if len(document.encoded.token_ids):
                self._last_productive_epoch = document.epoch
                return document
            if document.epoch > self._last_productive_epoch + 1:
                raise self.source.error("yields no token")

    def state(self) -> State:
        """Returns the source's state; valid only before the first `next`, as `next` reads ahead."""
        return self._documents.state()

    def restore(self, state: State) -> None:
        """Makes `next` continue at `state`; raises ValueError if a file changed since then."""
        self._documents.restore(state)
        self._last_productive_epoch = self._documents.epoch
        self._begin()

    def _encode(self) -> Iterator[PrefetchedDocument]:
        while True:
            while len(self._pending) <= self._workers.depth and not self._has_failed:
                self._pending.append(self._read_batch())
            batch = self._pending.popleft()
            for document, encoded in zip(batch.documents, batch.results(), strict=True):
                if isinstance(encoded, BadLineError):
                    self._documents.bad_lines.skip(encoded, is_counted=True)
                    yield document
                else:
                    yield document._replace(encoded=encoded)
            if batch.error is not None:
                raise batch.error

    def _read_batch(self) -> _PendingBatch:
        batch, documents = list[PrefetchedDocument](), list[Document]()
        size, error = 0, None
        while len(batch) < BATCH_DOCUMENTS and size < BATCH_CHARACTERS:
            state_before = self._documents.state()
            try:
                document = self._documents.next()
            except Exception as caught:  # raised after the earlier documents are used
                error, self._has_failed = caught, True
                break
            documents.append(document)
            epoch = self._documents.epoch
            batch.append(PrefetchedDocument(EMPTY, document.origin, state_before, epoch))
            size += document.num_characters
        return _PendingBatch(batch, self._workers.encode(documents), error)
