"""Log output: rank 0 prints messages and warnings, the other ranks only warnings."""

import logging
import os
from typing import TextIO

from monitor.console import Console

# The INFO messages of these libraries are not about the run.
_QUIET = ("datasets", "filelock", "httpx", "huggingface_hub", "matplotlib", "torch", "urllib3")


class ConsoleHandler(logging.Handler):
    """A handler that prints on a console, which puts each log line above the progress line."""

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
    higher, as `rank 3: message`. Returns the console, on which `monitor.progress.Progress` prints.

    If the environment variable TORCH_CPP_LOG_LEVEL is unset, sets it to ERROR. With the default of
    torch, its sockets would log messages about a lost rank before the line that names the rank. The
    import of torch reads the variable, so this function must be called before the import.
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
