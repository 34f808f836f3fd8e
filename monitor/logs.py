"""Where log records go: rank 0 tells the story, the others speak only when something is wrong."""

from __future__ import annotations

import logging
from typing import TextIO

from monitor.console import Console

# Libraries whose messages of level INFO are no part of the story.
_QUIET = ("datasets", "filelock", "httpx", "huggingface_hub", "matplotlib", "torch", "urllib3")


class ConsoleHandler(logging.Handler):
    """Prints records through a console, so that they do not break its live line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(self.format(record))
        except Exception:  # as logging's own handlers: a bad record must not end the run
            self.handleError(record)


def setup_logging(rank: int, stream: TextIO) -> Console:
    """Sends the process's log records to `stream`, in place of whatever was set up before.

    Rank 0 prints messages from INFO on as they are, other ranks those from WARNING on, as
    `rank 3: message`. Returns the console, for `monitor.progress.Progress` to share.
    """
    console = Console(stream)
    handler = ConsoleHandler(console)
    prefix, level = ("", logging.INFO) if rank == 0 else (f"rank {rank}: ", logging.WARNING)
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    return console
