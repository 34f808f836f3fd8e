"""Exit of a process after an error: one line on stderr, then the end of the process."""

import contextlib
import logging
import os
import sys
import threading
from typing import NoReturn

_FLUSH_SECONDS = 3.0


def report_line(line: str) -> None:
    """Writes `line` to stderr as exactly one line."""
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not keep a process alive
        sys.stderr.write(" ".join(line.split()) + "\n")
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
