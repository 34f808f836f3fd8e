"""Documents are tokenized in processes of their own, ahead of training, and come back in order."""

from __future__ import annotations

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
from tasks.tokenization.encoder import NOTHING, Encoded, Encoder

Results = list[Encoded | BadLineError]

# What is sent to all processes of a terminal or a job is for the rank: it ends its workers.
FOR_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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

        Both raise ChildProcessError where a process died; the others are of no use then, and end.
        """
        if self._num_workers == 0:
            return partial(self._encoder.encode_all, documents)
        if self._pool is None:
            self._pool = self._open()
        with self._pool_may_break(), _signals_blocked():  # a process is started here
            future = self._pool.submit(_encode, documents)

        def result() -> Results:
            with self._pool_may_break():
                return future.result().results()

        return result

    @contextlib.contextmanager
    def _pool_may_break(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            self._kill()
            raise ChildProcessError(
                "a process that tokenizes died, killed perhaps for want of memory; "
                "--data-workers 0 does without"
            ) from error

    def _kill(self) -> None:
        """The pool sends SIGTERM, which they ignore, and waits for them, perhaps for ever: for a
        lock of a queue that the dead one held."""
        processes = {} if self._pool is None else self._pool._processes or {}
        for process in list(processes.values()):
            process.kill()

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


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """In this thread, and so in processes that it starts, from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RANK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Sent(NamedTuple):
    """Results on their way between processes: one array of all documents' tokens, not one each."""

    ends: list[int]
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    bad: dict[int, BadLineError]

    @classmethod
    def of(cls, results: Results) -> _Sent:
        """`results`, put together."""
        bad = {i: one for i, one in enumerate(results) if isinstance(one, BadLineError)}
        good = [NOTHING if isinstance(one, BadLineError) else one for one in results]
        ends = list(itertools.accumulate(len(one.tokens) for one in good))
        tokens = np.concatenate([one.tokens for one in good]) if good else NOTHING.tokens
        trained = np.concatenate([one.trained for one in good]) if good else NOTHING.trained
        return cls(ends, tokens, trained, bad)

    def results(self) -> Results:
        """What was put together."""
        spans = map(slice, [0, *self.ends[:-1]], self.ends)
        return [
            self.bad.get(i) or Encoded(self.tokens[span], self.trained[span])
            for i, span in enumerate(spans)
        ]


_encoder: Encoder  # of a worker process, which has one for all its life


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    for number in FOR_THE_RANK:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(documents: Sequence[Document]) -> _Sent:
    return _Sent.of(_encoder.encode_all(documents))
