"""What a user's mistake ends with, and a file that runs code."""

import os
from collections.abc import Callable
from typing import Any

import pytest


def refusal(call: Callable[[], object]) -> str:
    """Returns the text of the ValueError that `call` raises, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def check_refused(call: Callable[[], object], *words: str) -> None:
    """One line, with these words."""
    line = refusal(call)
    assert len(line) < 500
    assert all(word in line for word in words), line


class RunsCode:
    """A pickle of it asks the reader to make a file in the working directory."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch ran",))
