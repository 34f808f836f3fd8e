"""The documents of a source that can be read at any place, truly shuffled over all, for ever.

Which item comes at which position depends on (seed, epoch, position) alone, so that the state is
two numbers, and restoring reads nothing.
"""

from __future__ import annotations

from functools import cached_property

from common.seeds import derive_seed
from common.text import shown
from tasks.shuffling.permutation import Permutation
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import BadLineError, Document, Items, Source, State


class FullShuffle:
    """A source's documents, each once an epoch; `source` has items.

    `seed` belongs to this source alone: two equal sources with two seeds differ in order. The items
    are opened, and lines found (`tasks.sources.line_index`), when the first document is asked for.
    """

    def __init__(self, source: Source, *, seed: int, bad_lines: BadLines | None = None) -> None:
        self.source = source
        self.bad_lines = bad_lines or BadLines()
        self._seed = seed
        self._go_to(0, 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self._position = epoch, position
        self._found_any = position > 0
        self._order: Permutation | None = None

    def next(self) -> Document:
        """The next document; after the last, the first of another order.

        Raises:
            ValueError: A line is no document (see `tasks.sources.bad_lines`), or the source holds
            none.
        """
        while True:
            if self._position == self._items.num_items:
                if not self._found_any:
                    raise self.source.empty_error()
                self._go_to(self.epoch + 1, 0)
                continue
            if self._order is None:
                seed = derive_seed(self._seed, "order", self.epoch)
                self._order = Permutation(self._items.num_items, seed)
            number = self._order[self._position]
            self._position += 1
            document = self._items.read(number)
            if isinstance(document, BadLineError):
                self.bad_lines.take(document)
            elif document is not None:
                self.bad_lines.note_good()
                self._found_any = True
                return document

    @property
    def num_lines(self) -> int:
        """Lines of all files, blank ones included, or rows."""
        return self._items.num_items

    @cached_property
    def _items(self) -> Items:
        assert self.source.open_items is not None
        return self.source.open_items()

    def state(self) -> State:
        """What `restore` needs to go on with the document that `next` would return now."""
        return {"epoch": self.epoch, "position": self._position, "files": self._items.digest}

    def restore(self, state: State) -> None:
        """Goes to where `state` was taken.

        Raises:
            ValueError: The files are not those that the state was taken from.
        """
        if "position" not in state:
            raise ValueError(
                f"{shown(self.source.name)}: the checkpoint was written when this source was "
                "shuffled chunk by chunk: its place in the data has no meaning any more"
            )
        if state["files"] != self._items.digest:
            raise ValueError(
                f"{shown(self.source.name)}: the source changed since the checkpoint: its files "
                "have other names, sizes or contents"
            )
        self._go_to(state["epoch"], state["position"])
