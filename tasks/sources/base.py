"""What a source of documents is made of, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from common.text import shown


class Message(NamedTuple):
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
    messages: tuple[Message, ...] | None = None


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
