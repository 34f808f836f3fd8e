"""Worker processes that encode documents in advance; results keep the order of the documents."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.sources.base import BadLineError, Document
from tasks.tokenization.encoder import EMPTY, EncodedDocument, Encoder, Results

# A terminal or job scheduler may signal all processes. Only the rank handles these signals, and it
# ends its workers.
RANK_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Workers:
    """A pool of `num_workers` processes that run `encoder`; with 0, the caller's process runs it.

    The processes start at the first `encode`, and end when the caller's process ends.
    """

    def __init__(self, encoder: Encoder, num_workers: int) -> None:
        self._encoder, self._num_workers = encoder, num_workers
        self._pool: ProcessPoolExecutor | None = None

    @property
    def depth(self) -> int:
        """The number of `encode` calls to start in advance, so that every process is busy."""
        return 0 if self._num_workers == 0 else self._num_workers + 1

    def encode(self, documents: Sequence[Document]) -> Callable[[], Results]:
        """Starts to encode `documents`; returns a function that waits for the results.

        This method and the returned function raise ChildProcessError if a worker process died.
        Before they raise it, they end all workers.
        """
        if self._num_workers == 0:
            return partial(self._encoder.encode_all, documents)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self._encoder,),
            )
        with self._handle_death(), _signals_blocked():  # a process may start here
            future = self._pool.submit(_encode, documents)

        def result() -> Results:
            with self._handle_death():
                return future.result().unpack()

        return result

    @contextlib.contextmanager
    def _handle_death(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            # The other workers ignore the pool's SIGTERM, and can wait forever for a queue's lock
            # that the dead process held.
            processes = {} if self._pool is None else self._pool._processes or {}
            for process in list(processes.values()):
                process.kill()
            raise ChildProcessError(
                "a tokenizer process died, perhaps because memory was full; "
                "--data-workers 0 tokenizes without extra processes"
            ) from error

    def close(self) -> None:
        """Ends the processes; can be called twice."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks RANK_SIGNALS in this thread, and in processes that start in the `with` block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, RANK_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _ResultMessage(NamedTuple):
    """The results in the form that a worker sends; one array has the tokens of all documents."""

    ends: list[int]
    token_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    errors: dict[int, BadLineError]

    @classmethod
    def pack(cls, results: Results) -> "_ResultMessage":
        """Joins the arrays of `results` and returns the message."""
        errors = {i: item for i, item in enumerate(results) if isinstance(item, BadLineError)}
        documents = [EMPTY if isinstance(item, BadLineError) else item for item in results]
        ends = list(itertools.accumulate(len(document.token_ids) for document in documents))
        token_ids = np.concatenate([EMPTY.token_ids, *(item.token_ids for item in documents)])
        trained = np.concatenate([EMPTY.trained, *(item.trained for item in documents)])
        return cls(ends, token_ids, trained, errors)

    def unpack(self) -> Results:
        """Returns the results, one for each document."""
        spans = map(slice, [0, *self.ends[:-1]], self.ends)
        return [
            self.errors.get(i) or EncodedDocument(self.token_ids[span], self.trained[span])
            for i, span in enumerate(spans)
        ]


_encoder: Encoder  # each worker process sets it at its start


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker process uses one core
    for number in RANK_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(documents: Sequence[Document]) -> _ResultMessage:
    return _ResultMessage.pack(_encoder.encode_all(documents))
