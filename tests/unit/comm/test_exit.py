"""Tests the one line that a process writes before it ends."""

import io

import pytest

from comm.lifecycle.exit import report_line


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (io.StringIO(), "18 s leftrank 1: a b\n"),
        (Terminal(), "18 s left\r\x1b[2Krank 1: a b\n"),  # deletes the line first
    ],
    ids=["file", "terminal"],
)
def test_the_line_replaces_a_progress_line(
    stream: io.StringIO, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, the progress line of another process does not stand before the error."""
    monkeypatch.setattr("sys.stderr", stream)
    stream.write("18 s left")  # by rank 0, without the end of the line
    report_line("rank 1: a\nb")
    assert stream.getvalue() == expected
