"""Log output: rank 0 prints messages and warnings, the other ranks only warnings."""

import logging
import os
from typing import TextIO

from monitor.console import Console

# The INFO messages of these libraries are not about the run.
_QUIET = ("datasets", "filelock", "httpx", "huggingface_hub", "matplotlib", "torch", "urllib3")


class ConsoleHandler(logging.Handler):
    """A handler that prints through a console, so that log lines do not break the live line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(self.format(record))
        except Exception:  # as in logging's handlers: a bad record must not end the run
            self.handleError(record)


def setup_logging(rank: int, stream: TextIO) -> Console:
    """Sends the log records of the process to `stream`, and replaces any earlier setup.

    Rank 0 prints messages of level INFO and higher. Other ranks print messages of level WARNING and
    higher, as `rank 3: message`. Also sets the variable TORCH_CPP_LOG_LEVEL if it is unset. Without
    this, torch's sockets would log a lost peer before the line that names the lost rank. torch
    reads the variable when it is imported, so this function must be called before that. Returns the
    console, on which `monitor.progress.Progress` prints.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    console = Console(stream)
    handler = ConsoleHandler(console)
    prefix, level = ("", logging.INFO) if rank == 0 else (f"rank {rank}: ", logging.WARNING)
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    return console
