"""A loader that prepares training batches in a background thread before they are needed."""

import contextlib
import queue
import threading

from tasks.mixture import BlockStream
from tasks.packing.blocks import TokenBatch, make_batch

DEPTH = 3


class BatchLoader:
    """A loader of batches of `rows` blocks from `stream`; it keeps at most `depth` batches ready.

    The loader owns the stream, so restore the stream before you create the loader. The state in a
    batch is the state of the stream right after the blocks of this batch.
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
        """Returns the next batch; after an error of the stream, every call raises this error."""
        assert not self._closed.is_set(), "the loader is closed"
        if self._error is None:
            item = self._queue.get()
            if isinstance(item, TokenBatch):
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """Ends the thread after its current batch, and closes the stream; can be called twice."""
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
        except Exception as error:  # `next` raises it in the caller's thread
            return error
