"""Batches made ahead of training, in one background thread."""

from __future__ import annotations

import contextlib
import queue
import threading

from tasks.mixture import BlockStream
from tasks.packing.blocks import Batch, make_batch

DEPTH = 3


class BatchLoader:
    """Takes `rows` blocks a batch from `stream`, at most `depth` batches ahead.

    The stream belongs to the loader from here on: restore it before. A batch carries the stream's
    state right after its own blocks, whatever was prefetched.
    """

    def __init__(self, stream: BlockStream, *, rows: int, depth: int = DEPTH) -> None:
        self._stream = stream
        self._rows = rows
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="batch-loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch.

        Raises:
            ValueError: What the stream raised, and again whenever called after that.
        """
        assert not self._stopped.is_set(), "the loader is closed"
        if self._error is None:
            item = self._ready.get()
            if isinstance(item, Batch):
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """Ends the thread, after its batch, and closes the stream; may be called twice."""
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join()
        self._stream.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            item = self._make()
            self._ready.put(item)
            if isinstance(item, Exception):
                return

    def _make(self) -> Batch | Exception:
        try:
            blocks = [self._stream.next_block() for _ in range(self._rows)]
            return make_batch(blocks, self._stream.state())
        except Exception as error:  # raised by next(), in the thread that can act on it
            return error
