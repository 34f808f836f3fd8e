"""Functions that check errors after a user's mistake, and an object whose pickle runs code."""

import os
from collections.abc import Callable
from typing import Any

import pytest


def refusal(call: Callable[[], object]) -> str:
    """Returns the text of `call`'s ValueError, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def check_refused(call: Callable[[], object], *words: str) -> None:
    """Checks that `call` raises a ValueError of one line that contains these words."""
    line = refusal(call)
    assert len(line) < 500
    assert all(word in line for word in words), line


class RunsCode:
    """An object whose pickle, if it is loaded, makes the file `ran` in the working directory."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch ran",))
