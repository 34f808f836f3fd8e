"""The policy for bad lines: a bad line is an error, or it is skipped and listed in a file."""

import logging
from pathlib import Path

from tasks.sources.base import BadLineError

logger = logging.getLogger(__name__)

# The smallest divisor of the share. Without it, one bad line among the first ten would be 10%.
MIN_LINES = 1000


class BadLines:
    """The policy: bad lines are skipped and listed in `file`; without `file`, they are errors.

    max_share: the run ends if more than this share of the lines read so far is bad. While fewer
        than MIN_LINES lines are read, the share is the number of bad lines divided by MIN_LINES.
    """

    def __init__(self, file: Path | None = None, *, max_share: float = 0.0) -> None:
        self._file, self._max_share = file, max_share
        self._recorded: set[str] | None = None
        self._num_read = self._num_skipped = 0

    def note_good(self) -> None:
        """Counts a good line."""
        self._num_read += 1

    def skip(self, error: BadLineError, *, is_counted: bool = False) -> None:
        """Skips a bad line; `is_counted`: `note_good` counted it before it proved to be bad.

        Raises ValueError if bad lines are errors, or if the share of bad lines is too large.
        """
        if self._file is None:
            raise error
        self._num_read, self._num_skipped = self._num_read + (not is_counted), self._num_skipped + 1
        self._record(self._file, str(error))
        if self._num_skipped == 1:
            logger.warning("skipped: %s; all skipped lines are listed in %s", error, self._file)
        if self._num_skipped > self._max_share * max(self._num_read, MIN_LINES):
            raise ValueError(
                f"{self._num_skipped} of {self._num_read} lines are bad, more than --max-bad-share "
                f"{self._max_share:g} allows: they are listed in {self._file}, the last: {error}"
            ) from error

    def _record(self, file: Path, line: str) -> None:
        """Appends the text `line` to `file`, unless this run or an earlier one already did so."""
        if self._recorded is None:
            self._recorded = set(file.read_text("utf-8").splitlines()) if file.is_file() else set()
        if line not in self._recorded:
            self._recorded.add(line)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")
