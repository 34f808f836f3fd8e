"""Tests that out-of-memory errors of CUDA, torch, Python and the OS are recognised."""

import errno
import os

import pytest
import torch

from monitor.out_of_memory import (
    is_host_memory,
    is_out_of_memory,
    library_status,
    requested_size,
)

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
    ("text", "status"),
    [
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
            "CUBLAS_STATUS_NOT_INITIALIZED",
        ),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
        (
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
            "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        ),
        (
            "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
            "CUSOLVER_STATUS_ALLOC_FAILED",
        ),
    ],
)
def test_those_of_cudas_libraries_are(text: str, status: str) -> None:
    """A full GPU made cuBLAS fail, and the run ended with a traceback in place of advice."""
    outer = RuntimeError("stage 0, forward of microbatch 0")
    outer.__cause__ = RuntimeError(text)
    assert is_out_of_memory(outer)
    assert not is_host_memory(outer)
    assert library_status(outer) == status


@pytest.mark.parametrize(
    ("error", "on_host"),
    [
        (torch.OutOfMemoryError(CUDA), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (ValueError("an error of another kind"), False),
    ],
)
def test_memory_of_the_host_is_told_from_that_of_a_gpu(error: Exception, on_host: bool) -> None:
    assert is_host_memory(error) == on_host
    assert library_status(error) == ""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(...)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        ValueError("out of memory"),
        RuntimeError("shapes differ"),
        OSError(errno.ENOSPC, "full"),
    ],
)
def test_others_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)
