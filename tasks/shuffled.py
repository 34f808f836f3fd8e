"""What a source's documents are to whoever takes them, however they are shuffled."""

from __future__ import annotations

from typing import Protocol

from tasks.sources.bad_lines import BadLines
from tasks.sources.base import Document, Source, State


class Shuffled(Protocol):
    """The documents of a source, without end: `tasks.shuffling.buffered`,
    `tasks.shuffling.full`."""

    source: Source
    epoch: int
    bad_lines: BadLines

    @property
    def num_lines(self) -> int | None:
        """How many lines there are, blank ones included; None where nothing tells but reading."""

    def next(self) -> Document: ...

    def state(self) -> State: ...

    def restore(self, state: State) -> None: ...
