"""The lock of the folder --checkpoint-path: only one run at a time can write to this folder."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)


def make_folder(path: Path) -> None:
    """Creates the folder `path` if it is missing.

    Raises:
        ValueError: the folder cannot be created or written; the text names the folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise _unwritable(path, PermissionError(errno.EACCES, "no permission"))


def lock_folder(path: Path) -> TextIO:
    """Locks the folder `path` until the returned file is closed; creates the folder if missing.

    The operating system releases the lock when the process ends, even after a crash. On a file
    system without locks (Lustre without `-o flock`, some NFS) the function logs a warning and locks
    nothing.

    Raises:
        ValueError: another process holds the lock, or the folder cannot be created or written.
    """
    make_folder(path)
    try:
        file = (path / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"--checkpoint-path {path}: in use by {holder}") from error
    except OSError as error:
        logger.warning(
            "--checkpoint-path %s: its file system cannot lock files (%s); do not start a second "
            "run that writes there at the same time",
            path,
            error.strerror,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _unwritable(path: Path, error: OSError) -> ValueError:
    text = f"this folder cannot be written: {error.strerror}"
    return ValueError(f"--checkpoint-path {path}: {text}")
