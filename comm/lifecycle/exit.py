"""Exit of a process after an error: one line on stderr, then the end of the process."""

import contextlib
import logging
import os
import sys
import threading
from typing import NoReturn

from common.text import CLEAR_LINE

_FLUSH_SECONDS = 3.0


def report_line(line: str) -> None:
    """Writes `line` to stderr as exactly one line.

    On a terminal, the line replaces the progress line, which rank 0 draws again.
    """
    start = CLEAR_LINE if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not keep a process alive
        sys.stderr.write(f"{start}{' '.join(line.split())}\n")
        sys.stderr.flush()


def report_and_exit(status: int, line: str) -> NoReturn:
    """Writes `line` to stderr and ends the process with exit status `status`."""
    report_line(line)
    exit_process(status)


def exit_process(status: int) -> NoReturn:
    """Ends the process now, from any thread, even if the main thread hangs in a library.

    Flushes the logs first. If flushing takes longer than 3 s, a timer ends the process.
    """
    timer = threading.Timer(_FLUSH_SECONDS, os._exit, [status])
    timer.daemon = True
    timer.start()
    try:
        for handler in logging.getLogger().handlers:
            handler.flush()
        sys.stdout.flush()
    finally:
        os._exit(status)
