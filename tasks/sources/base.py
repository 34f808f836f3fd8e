"""Documents and data sources, and the interfaces that files and rows of all formats have."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from common.text import shown

State = dict[str, Any]  # the state of a source or stream, serialisable as JSON

# Bytes at each end of a file that a digest covers; most edits that keep the size change an end.
DIGEST_BYTES = 1 << 16


class ChatMessage(NamedTuple):
    """A turn of a conversation; `role` is user, assistant or system."""

    role: str
    content: str


class Document(NamedTuple):
    """A text and its origin ("file:line"), which errors quote.

    completions: the parts of the text that are answers, as (start, end) characters; None: unknown.
    messages: a conversation instead of a text; the tokenizer's chat template makes a text of it.
    """

    text: str
    origin: str
    completions: tuple[tuple[int, int], ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None

    @property
    def num_characters(self) -> int:
        """The number of characters in the text and the messages."""
        return len(self.text) + sum(len(message.content) for message in self.messages or ())


class BadLineError(ValueError):
    """The error of a line that is not a document; the text names file, line and reason."""


class DocumentRecord(NamedTuple):
    """A document or bad line of a file, and the position in the file where reading continues.

    size: the approximate size of the document in memory, in bytes.
    offset: the position; each kind of file has its own unit, such as bytes of text, or rows.
    line: the number of lines or rows before the position.
    """

    document: Document | BadLineError
    size: int
    offset: int
    line: int


class SourceFile(Protocol):
    """One file of a source; it can be read in order from the position of any record."""

    @property
    def path(self) -> str:
        """The path of the file; errors name it."""

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        """Yields the records from a position to the end; the default position is the beginning.

        Raises ValueError if the file cannot be read; the text names file and line.
        """


class IndexedRows(Protocol):
    """Rows that can be read in any order: lines of files or rows of a table, numbered from 0."""

    @property
    def num_rows(self) -> int:
        """The number of rows, including blank rows."""

    @property
    def digest(self) -> str:
        """A hash of the data; it changes when the data changes."""

    def read(self, row: int) -> Document | BadLineError | None:
        """Returns the document of a row, or the error of a bad row; None if the row is blank.

        Raises ValueError if the data cannot be read or has changed.
        """


@dataclass(frozen=True)
class DataSource:
    """A data source with its sorted files.

    open_rows: opens the rows of all files; None if the files can only be read in order.
    """

    name: str
    files: Sequence[SourceFile]
    open_rows: Callable[[], IndexedRows] | None = None

    def error(self, problem: str = "holds no document") -> ValueError:
        """Returns a ValueError with the source's name and `problem`."""
        return ValueError(f"{shown(self.name)}: the source {problem}")

    def changed_error(self, difference: str) -> ValueError:
        """Returns the error of a source that has changed since the checkpoint."""
        return self.error(f"changed since the checkpoint: {difference}")


@dataclass(frozen=True)
class IndexedFile:
    """A file or folder with rows that can be read in any order; `open_rows` opens these rows.

    A record's offset and line are both the number of rows read.
    """

    path: str
    open_rows: Callable[[], IndexedRows]

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        rows = self.open_rows()
        for row in range(offset, rows.num_rows):
            document = rows.read(row)
            if document is not None:
                yield row_record(document, row + 1)


def row_record(document: Document | BadLineError, position: int) -> DocumentRecord:
    """Returns the record of a table's row; `position` is the row's index + 1."""
    size = 0 if isinstance(document, BadLineError) else document.num_characters
    return DocumentRecord(document, size, position, position)


def describe_file(path: str, num_rows: int) -> bytes:
    """Returns a file's name, size, number of rows, and a hash of its first and last bytes.

    Raises ValueError if the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(DIGEST_BYTES)
            file.seek(max(0, size - DIGEST_BYTES))
            ends_hash = hashlib.blake2b(start + file.read(DIGEST_BYTES)).hexdigest()
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error
    return os.fsencode(f"{os.path.basename(path)}\0{size}\0{num_rows}\0{ends_hash}\0")
