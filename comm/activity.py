"""What this process is doing, in words, for the message of the one who waits for it or with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Activity:
    """One mutable text, cheap to set; read by the liveness link's thread when a rank is lost."""

    def __init__(self) -> None:
        self.text = "start"

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Sets `text` for a block; after an error it stays, to be told."""
        before, self.text = self.text, text
        yield
        self.text = before
