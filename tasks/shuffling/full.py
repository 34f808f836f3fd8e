"""An endless full shuffle of all documents, for a source whose rows can be read in any order.

The row at a position depends only on (seed, epoch, position), so the state is the epoch, the
position and a digest of the files. A restore reads no document.
"""

from functools import cached_property

from common.seeds import derive_seed
from tasks.shuffling.permutation import Permutation
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import BadLineError, DataSource, Document, IndexedRows, State


class FullShuffle:
    """A shuffle of a source whose `open_rows` is not None; it yields each document once per epoch.

    Shuffles with different seeds yield the documents of the same source in different orders. The
    rows of the source are opened when they are first needed; for a file of lines, this makes or
    loads an index of the lines.
    """

    def __init__(self, source: DataSource, *, seed: int, bad_lines: BadLines | None = None) -> None:
        self.source = source
        self.bad_lines = bad_lines or BadLines()
        self._seed = seed
        self._move_to(0, 0)

    def _move_to(self, epoch: int, position: int) -> None:
        self.epoch, self._position = epoch, position
        self._has_documents = position > 0
        self._order: Permutation | None = None

    def next(self) -> Document:
        """Returns the next document; raises ValueError like `BufferedShuffle.next`."""
        while True:
            if self._position == self._rows.num_rows:
                if not self._has_documents:
                    raise self.source.error()
                self._move_to(self.epoch + 1, 0)
            if self._order is None:
                seed = derive_seed(self._seed, "order", self.epoch)
                self._order = Permutation(self._rows.num_rows, seed)
            document = self._rows.read(self._order[self._position])
            self._position += 1
            if isinstance(document, BadLineError):
                self.bad_lines.skip(document)
            elif document is not None:
                self.bad_lines.note_good()
                self._has_documents = True
                return document

    @property
    def num_rows(self) -> int:
        """The number of lines or rows in all files, including blank lines."""
        return self._rows.num_rows

    @cached_property
    def _rows(self) -> IndexedRows:
        assert self.source.open_rows is not None
        return self.source.open_rows()

    def state(self) -> State:
        """Returns the state from which `restore` continues with the next document."""
        return {"epoch": self.epoch, "position": self._position, "files": self._rows.digest}

    def restore(self, state: State) -> None:
        """Restores what the method `state` returned; raises ValueError if the files changed."""
        if "position" not in state:
            raise self.source.changed_error(
                "it could only be read in file order, and can now be read in any order"
            )
        if state["files"] != self._rows.digest:
            raise self.source.changed_error("its files have other names, sizes or contents")
        self._move_to(state["epoch"], state["position"])
