"""The end of a process because of an error: one line on stderr, then the exit."""

import contextlib
import logging
import os
import sys
import threading
from typing import NoReturn

_FLUSH_SECONDS = 3.0


def report_line(line: str) -> None:
    """Writes `line` on stderr as exactly one line."""
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not keep a process alive
        sys.stderr.write(" ".join(line.split()) + "\n")
        sys.stderr.flush()


def report_and_exit(status: int, line: str) -> NoReturn:
    """Writes `line` on stderr and ends the process."""
    report_line(line)
    exit_process(status)


def exit_process(status: int) -> NoReturn:
    """Ends the process now, from any thread, even if the main thread is stuck in a library.

    Nothing may delay the end: if flushing the log blocks, a timer ends the process.
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
