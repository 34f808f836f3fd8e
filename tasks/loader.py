"""A loader that makes training batches ahead, in a background thread."""

import contextlib
import queue
import threading

from tasks.mixture import BlockStream
from tasks.packing.blocks import TokenBatch, make_batch

DEPTH = 3


class BatchLoader:
    """Makes batches of `rows` blocks of `stream`, at most `depth` batches ahead.

    The loader owns the stream: restore it before. The state in a batch is the stream's right after
    that batch's blocks, however far the loader is ahead.
    """

    def __init__(self, stream: BlockStream, *, rows: int, depth: int = DEPTH) -> None:
        self._stream = stream
        self._rows = rows
        self._queue: queue.Queue[TokenBatch | Exception] = queue.Queue(depth)
        self._closed = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="batch-loader", daemon=True)
        self._thread.start()

    def next(self) -> TokenBatch:
        """Returns the next batch, or raises the stream's error, also at every later call."""
        assert not self._closed.is_set(), "the loader is closed"
        if self._error is None:
            item = self._queue.get()
            if isinstance(item, TokenBatch):
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """Ends the thread, after its batch, and closes the stream; may be called twice."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join()
        self._stream.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            item = self._make_batch()
            self._queue.put(item)
            if isinstance(item, Exception):
                return

    def _make_batch(self) -> TokenBatch | Exception:
        try:
            blocks = [self._stream.next_block() for _ in range(self._rows)]
            return make_batch(blocks, self._stream.state())
        except Exception as error:  # raised by `next`, in the thread that handles it
            return error
