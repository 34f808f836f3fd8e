"""Tests the lock of the folder --checkpoint-path, also on file systems without locks."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from checkpoint.lock import lock_folder


def raising(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_who_comes_second_is_told_who_holds_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with lock_folder(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()
    assert not caplog.text


def test_another_word_for_a_held_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error EACCES, which NFS may give, means that another process holds the lock."""
    raising(monkeypatch, errno.EACCES)
    with pytest.raises(ValueError, match="in use by another process"):
        lock_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_told_of_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raising(monkeypatch, number)
    lock_folder(tmp_path).close()
    (line,) = caplog.messages
    assert line == (
        f"--checkpoint-path {tmp_path}: its file system cannot lock files ({os.strerror(number)}); "
        "do not start a second run that writes there at the same time"
    )
