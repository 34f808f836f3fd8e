"""A terminal that logs and a live line share: lines scroll above, the live line stays below."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TextIO

_CLEAR = "\r\x1b[2K"


class Console:
    """Prints whole lines to `stream` and, on a terminal, keeps one live line under them.

    Safe to call from any thread. A terminal that went away ends no training: what cannot be
    written is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._live = ""
        self._lock = threading.RLock()

    def print(self, text: str) -> None:
        """Writes `text` and a line's end, above the live line where there is one."""
        with self._lock:
            if self._live:
                self._write(f"{_CLEAR}{text}\n{self._live}")
            else:
                self._write(f"{text}\n")

    def set_live(self, text: str) -> None:
        """Rewrites the live line in place, cut to the terminal's width."""
        assert self.is_terminal
        with self._lock:
            self._live = text[: self._columns() - 1]
            self._write(f"{_CLEAR}{self._live}")

    def keep_live(self) -> None:
        """Ends the live line, which stays as a line among the others."""
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
