"""What becomes of lines that are no document: an error, or a count and a line in a file."""

from __future__ import annotations

import logging
from pathlib import Path

from tasks.sources.base import BadLineError

logger = logging.getLogger(__name__)

FEWEST = 1000  # lines of which a share is taken at least: one bad line of the first ten is not 10%


class BadLines:
    """Skips bad lines where `file` is given, and writes there which they were; else raises.

    max_share: of the lines read so far, and of FEWEST at the least; more than that end the run.
    """

    def __init__(self, file: Path | None = None, *, max_share: float = 0.0) -> None:
        self._file, self._max_share = file, max_share
        self._known: set[str] | None = None
        self._read = self._skipped = 0

    def note_good(self) -> None:
        """A line was a document."""
        self._read += 1

    def take(self, error: BadLineError, *, noted: bool = False) -> None:
        """A line was none; `noted`: it had looked good, and was noted so.

        Raises:
            ValueError: Lines are not skipped, or too many were.
        """
        if self._file is None:
            raise error
        self._read, self._skipped = self._read + (not noted), self._skipped + 1
        self._write(self._file, str(error))
        if self._skipped == 1:
            logger.warning("skipped: %s; all that are skipped are named in %s", error, self._file)
        if self._skipped > self._max_share * max(self._read, FEWEST):
            raise ValueError(
                f"{self._skipped} of {self._read} lines are bad, more than --max-bad-share "
                f"{self._max_share:g} allows: they are named in {self._file}, the last is {error}"
            ) from error

    def _write(self, file: Path, line: str) -> None:
        """Once for each line, however often it is read in this run and those that it goes on."""
        if self._known is None:
            self._known = set(file.read_text("utf-8").splitlines()) if file.is_file() else set()
        if line not in self._known:
            self._known.add(line)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")
