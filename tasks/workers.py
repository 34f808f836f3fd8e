"""Documents are tokenized in processes of their own, ahead of training, and come back in order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from tasks.encoding import Encoded, Encoder
from tasks.source import BadLineError, Document

logger = logging.getLogger(__name__)

Results = list[Encoded | BadLineError]


class Workers:
    """`num_workers` processes that run `encoder`; with 0 the caller's own does, when asked.

    The processes are started when the first documents are given, and end with this one.
    """

    def __init__(self, encoder: Encoder, num_workers: int) -> None:
        self._encoder, self._num_workers = encoder, num_workers
        self._pool: ProcessPoolExecutor | None = None

    @property
    def depth(self) -> int:
        """How many lists of documents to give ahead, to keep every process busy."""
        return 0 if self._num_workers == 0 else self._num_workers + 1

    def encode(self, documents: Sequence[Document]) -> Callable[[], Results]:
        """Has `documents` encoded; the function that is returned waits for the results.

        It raises RuntimeError where a process died.
        """
        if self._num_workers == 0:
            return partial(self._encoder.encode_all, documents)
        if self._pool is None:
            self._pool = self._open()
        future = self._pool.submit(_encode, documents)

        def result() -> Results:
            try:
                return future.result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "a process that tokenizes died, killed perhaps for want of memory; "
                    "--data-workers 0 does without"
                ) from error

        return result

    def _open(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._encoder,),
        )

    def close(self) -> None:
        """Ends the processes; may be called twice."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


_encoder: Encoder  # of a worker process, which has one for all its life


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    # What is sent to all processes of a terminal or a job is for the rank: it ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(documents: Sequence[Document]) -> Results:
    return _encoder.encode_all(documents)
