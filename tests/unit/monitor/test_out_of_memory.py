"""Tests that out-of-memory errors of CUDA, torch, Python and the OS are recognised."""

import errno
import os

import pytest
import torch

from monitor.out_of_memory import is_out_of_memory, requested_size

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.2 GiB is free."
)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), "2.00 GiB"),
        (RuntimeError("CUDA error: out of memory"), ""),
        (MemoryError(), ""),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), ""),
    ],
)
def test_they_are_told(error: Exception, asked: str) -> None:
    assert is_out_of_memory(error)
    assert requested_size(error) == asked
    outer = RuntimeError("stage 0")
    outer.__cause__ = error
    assert is_out_of_memory(outer)
    assert requested_size(outer) == asked


def test_that_of_torchs_cpu_allocator_is() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert requested_size(caught.value) == f"{2**60} bytes"


@pytest.mark.parametrize(
    "error",
    [ValueError("out of memory"), RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full")],
)
def test_others_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)
