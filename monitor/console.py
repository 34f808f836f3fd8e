"""Log lines on a terminal, and below them one live line, whose text is replaced in place."""

import contextlib
import os
import threading
from typing import TextIO

from common.text import CLEAR_LINE


class Console:
    """A stream for complete lines and, on a terminal, one live line below them.

    The class is thread-safe. Text that cannot be written is dropped, so that training continues
    after the terminal is closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._live = ""
        self._lock = threading.RLock()

    def print(self, text: str) -> None:
        """Writes `text` as a line, above the live line if there is one."""
        with self._lock:
            self._write(f"{CLEAR_LINE}{text}\n{self._live}" if self._live else f"{text}\n")

    def set_live(self, text: str) -> None:
        """Replaces the live line by `text`, which is cut to the width of the terminal."""
        assert self.is_terminal
        with self._lock:
            self._live = text[: self._columns() - 1]
            self._write(f"{CLEAR_LINE}{self._live}")

    def keep_live(self) -> None:
        """Ends the live line, which stays on the terminal as an ordinary line."""
        with self._lock:
            if self._live:
                self._write("\n")
            self._live = ""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self.stream.write(text)
            self.stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80
