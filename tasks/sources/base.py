"""Documents, and the interfaces of the files that they are read from, whatever the format."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from common.text import shown

State = dict[str, Any]  # of a source or stream, serialisable as JSON

# Bytes of each end of a file that a digest covers: an edit that keeps the size mostly shows there.
DIGEST_BYTES = 1 << 16


class ChatMessage(NamedTuple):
    """A turn of a conversation; `role` is user, assistant or system."""

    role: str
    content: str


class Document(NamedTuple):
    """A text, and its origin ("file:line"), for messages.

    completions: the characters of the text that answer the others, as (start, end); None: unknown.
    messages: a conversation in place of the text, which the tokenizer's chat template renders.
    """

    text: str
    origin: str
    completions: tuple[tuple[int, int], ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None

    @property
    def num_characters(self) -> int:
        """Returns the length of its text, or of its messages."""
        return len(self.text) + sum(len(message.content) for message in self.messages or ())


class BadLineError(ValueError):
    """A line that is no document; its text is a single line that names file, line and reason."""


class DocumentRecord(NamedTuple):
    """A document or bad line of a file, and the position after it, from where reading continues.

    size: about its bytes in memory.
    offset, line: of the position; only the file knows their unit.
    """

    document: Document | BadLineError
    size: int
    offset: int
    line: int


class SourceFile(Protocol):
    """One file of a source, read in order from the position of any record."""

    @property
    def path(self) -> str:
        """Returns its path, as messages name it."""

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        """Yields the records from a position on; the default is the beginning.

        Raises ValueError if the file cannot be read on; the text names it, and the line.
        """


class IndexedRows(Protocol):
    """Rows that are read in any order: lines of files or rows of a table, numbered from 0."""

    @property
    def num_rows(self) -> int:
        """Returns the number of rows, blank ones included."""

    @property
    def digest(self) -> str:
        """Returns a digest that differs where the data has changed."""

    def read(self, row: int) -> Document | BadLineError | None:
        """Returns the document of a row, or its error; None where the row is blank.

        Raises ValueError if the data cannot be read, or has changed.
        """


@dataclass(frozen=True)
class DataSource:
    """A source that --task-name names, with its files, sorted.

    open_rows: opens the rows of all files; None: the files can only be read in order.
    """

    name: str
    files: Sequence[SourceFile]
    open_rows: Callable[[], IndexedRows] | None = None

    def error(self, problem: str = "holds no document") -> ValueError:
        """Returns the error of a source that has a problem."""
        return ValueError(f"{shown(self.name)}: the source {problem}")

    def changed_error(self, difference: str) -> ValueError:
        """Returns the error of a source that differs from that of a checkpoint."""
        return self.error(f"changed since the checkpoint: {difference}")


@dataclass(frozen=True)
class IndexedFile:
    """A file whose rows `open_rows` opens; the offset and line of a record count rows."""

    path: str
    open_rows: Callable[[], IndexedRows]

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        rows = self.open_rows()
        for row in range(offset, rows.num_rows):
            document = rows.read(row)
            if document is not None:
                yield row_record(document, row + 1)


def row_record(document: Document | BadLineError, position: int) -> DocumentRecord:
    """Returns the record of a row of a table; `position` is the number of rows up to it."""
    size = 0 if isinstance(document, BadLineError) else document.num_characters
    return DocumentRecord(document, size, position, position)


def describe_file(path: str, num_rows: int) -> bytes:
    """Returns a file's name, size, rows and a hash of both its ends, or raises ValueError."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(DIGEST_BYTES)
            file.seek(max(0, size - DIGEST_BYTES))
            ends_hash = hashlib.blake2b(start + file.read(DIGEST_BYTES)).hexdigest()
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error
    return os.fsencode(f"{os.path.basename(path)}\0{size}\0{num_rows}\0{ends_hash}\0")
