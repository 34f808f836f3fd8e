"""Policy for lines that are no document: an error, or a count and an entry in a file."""

import logging
from pathlib import Path

from tasks.sources.base import BadLineError

logger = logging.getLogger(__name__)

MIN_LINES = 1000  # a share is taken of at least so many: one bad line of the first ten is not 10%


class BadLines:
    """Skips bad lines where `file` is given, and records them there; otherwise raises their errors.

    max_share: the largest share of bad lines among the lines read so far (at least MIN_LINES); a
    larger one ends the run.
    """

    def __init__(self, file: Path | None = None, *, max_share: float = 0.0) -> None:
        self._file, self._max_share = file, max_share
        self._recorded: set[str] | None = None
        self._num_read = self._num_skipped = 0

    def note_good(self) -> None:
        """Counts a line that is a document."""
        self._num_read += 1

    def skip(self, error: BadLineError, *, is_counted: bool = False) -> None:
        """Skips a bad line; `is_counted`: it was counted as a good one.

        Raises ValueError if lines are not skipped, or too many were.
        """
        if self._file is None:
            raise error
        self._num_read, self._num_skipped = self._num_read + (not is_counted), self._num_skipped + 1
        self._record(self._file, str(error))
        if self._num_skipped == 1:
            logger.warning("skipped: %s; all that are skipped are named in %s", error, self._file)
        if self._num_skipped > self._max_share * max(self._num_read, MIN_LINES):
            raise ValueError(
                f"{self._num_skipped} of {self._num_read} lines are bad, more than --max-bad-share "
                f"{self._max_share:g} allows: they are named in {self._file}, the last is {error}"
            ) from error

    def _record(self, file: Path, line: str) -> None:
        """Writes each line once, however often this run and those that it resumes read it."""
        if self._recorded is None:
            self._recorded = set(file.read_text("utf-8").splitlines()) if file.is_file() else set()
        if line not in self._recorded:
            self._recorded.add(line)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")
