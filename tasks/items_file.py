"""What can be read at any place, read in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tasks.sources.base import BadLineError, Document, Items, Record


@dataclass(frozen=True)
class ItemsFile:
    """A file of a source whose items `open_items` opens; a record's offset and line count items."""

    path: str
    open_items: Callable[[], Items]

    def read(self, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """See `tasks.sources.base.SourceFile.read`."""
        items = self.open_items()
        for number in range(offset, items.num_items):
            document = items.read(number)
            if document is not None:
                yield Record(document, size_of(document), number + 1, number + 1)


def size_of(document: Document | BadLineError) -> int:
    """About its bytes in memory."""
    if isinstance(document, BadLineError):
        return 0
    return len(document.text) + sum(len(one.content) for one in document.messages or ())
