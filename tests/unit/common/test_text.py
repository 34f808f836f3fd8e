"""Tests the texts of durations."""

import pytest

from common.text import format_duration, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1:00 min"), (187, "3:07 min"), (18120, "5:02 h"), (190000, "2 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.01234, "12.3 ms"), (1.0, "1 s"), (59.94, "59.9 s"), (139000.0, "1 d 14 h")],
)
def test_seconds_of_any_size_are_readable(seconds: float, text: str) -> None:
    """A slow link once took `1.39e+05 s` in a report."""
    assert format_seconds(seconds) == text
