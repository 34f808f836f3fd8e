"""What a source of documents is made of, whatever its format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from common.text import shown


class ChatMessage(NamedTuple):
    """What one side says in a conversation; `role` is user, assistant or system."""

    role: str
    content: str


class Document(NamedTuple):
    """A text, and where it stands ("file:line"), for messages.

    completions: which characters of the text answer the others, as (start, end); None: not said.
    messages: a conversation in place of the text, which the tokenizer's chat template is to make.
    """

    text: str
    where: str
    completions: tuple[tuple[int, int], ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None


class BadLineError(ValueError):
    """A line that is no document; the text is one line that names file, line and reason."""


def one_line(error: Exception) -> str:
    """What a library says, as it may stand in a message."""
    return " ".join(str(error).split()) or type(error).__name__


class Record(NamedTuple):
    """A document, or a bad line, as a file yields it, with the place right after it, from where to
    read on.

    `offset` and `line` mean something to the file alone; `size` is about its bytes in memory.
    """

    document: Document | BadLineError
    size: int
    offset: int
    line: int


class SourceFile(Protocol):
    """One file of a source, read in order from any place that a record named."""

    @property
    def path(self) -> str:
        """Its path, as messages name it."""

    def read(self, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """The records from a place on; the default is the beginning.

        Raises:
            ValueError: The file cannot be read on; the text names it, and the line.
        """


class Items(Protocol):
    """What can be read at any place: lines of files, or rows of a table, counted through from 0."""

    @property
    def num_items(self) -> int:
        """How many there are, blank ones included."""

    @property
    def digest(self) -> str:
        """Says which data it is: another where that has changed."""

    def read(self, number: int) -> Document | BadLineError | None:
        """The document of an item, or what is wrong with it; None where it is blank.

        Raises:
            ValueError: The data cannot be read, or is not what it was.
        """


@dataclass(frozen=True)
class Source:
    """What --task-name names: its name and its files, sorted.

    open_items: makes of all files what can be read at any place; None: they are read in order.
    """

    name: str
    files: Sequence[SourceFile]
    open_items: Callable[[], Items] | None = None

    def empty_error(self, what: str = "holds no document") -> ValueError:
        """The error for a source that nothing can be made of."""
        return ValueError(f"{shown(self.name)}: the source {what}")


State = dict[str, Any]


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


SAMPLE_BYTES = 1 << 16  # of each end of a file: an edit that keeps the size is most likely seen


def describe_file(path: str, num_items: int) -> bytes:
    """A file's name, size and both ends, and how many items it has, for a digest.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(SAMPLE_BYTES)
            file.seek(max(0, size - SAMPLE_BYTES))
            ends = hashlib.blake2b(first + file.read(SAMPLE_BYTES)).hexdigest()
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error
    return os.fsencode(f"{os.path.basename(path)}\0{size}\0{num_items}\0{ends}\0")
