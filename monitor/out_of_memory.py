"""Whether an error is memory that the device or the machine did not have: each library has its own
words for it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import torch

_WORDS = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says so."""
    return any(map(_says_so, causes(error)))


def asked_for(error: BaseException) -> str:
    """What could not be had, as `2.00 GiB`; empty where the error does not tell."""
    found = (_ASKED.search(str(one)) for one in causes(error) if _says_so(one))
    return next((match[1] for match in found if match is not None), "")


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it was raised from, and so on."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None
