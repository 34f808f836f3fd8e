"""What a user's mistake ends with."""

from collections.abc import Callable

import pytest


def refusal(call: Callable[[], object]) -> str:
    """Returns the text of the ValueError that `call` raises, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text
