"""Tests pinned host memory: its size, which depends on torch's options, and the error if it fails.

The sizes were found by reading torch 2.13.0: the rule in ATen/core/CachingHostAllocator.h, and the
limits that libc10.so holds after it has read each of these variables.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from common.tensors import HostMemoryError, pinned_bytes, pinned_empty
from monitor.out_of_memory import is_host_memory, is_out_of_memory, requested_size

MIB = 2**20
NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
ROUND, CACHE = "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"
FULL = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some"


@pytest.mark.parametrize(
    ("variables", "limit"),
    [
        ({}, None),
        ({NEW: "expandable_segments:True"}, None),
        ({NEW: f"expandable_segments:True,{ROUND}:1"}, MIB),
        ({NEW: f"{ROUND}:1,{CACHE}:1"}, MIB),
        ({NEW: f" {ROUND} : 4 , roundup_power2_divisions:[256:1,>:2]"}, 4 * MIB),
        ({NEW: f"{ROUND}:7,{ROUND}:2"}, 2 * MIB),
        ({NEW: f"{CACHE}:2,{ROUND}:7"}, 2 * MIB),
        ({NEW: f"x{ROUND}:7"}, None),
        ({NEW: f"{ROUND}:0"}, 0),
        ({NEW: f"{ROUND}:7", OLD: "garbage_collection_threshold:0.5"}, None),
        ({NEW: f"{ROUND}:7", OLD: ""}, None),
        ({NEW: "garbage_collection_threshold:0.5", OLD: f"{ROUND}:7"}, 7 * MIB),
    ],
)
def test_sizes_above_the_limit_are_exact_and_others_are_powers_of_two(
    variables: dict[str, str], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (NEW, OLD):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    powers = {0: 0, 1: 1, 3: 4, 4096: 4096, MIB + 1: 2 * MIB, 7 * MIB: 8 * MIB, 33 * MIB: 64 * MIB}
    for size, rounded in powers.items():
        expected = rounded if limit is None or size <= limit else size
        assert pinned_bytes(size) == expected, size


def test_only_memory_beside_a_gpu_is_pinned_and_a_dry_run_counts_it_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(OLD, raising=False)
    monkeypatch.setenv(NEW, f"{ROUND}:1")
    for shape, on_gpu in (((3, 5), 64), ((3, MIB), 12 * MIB)):
        for device, size in (("cpu", 4 * shape[0] * shape[1]), ("meta", on_gpu)):
            tensor = pinned_empty(shape, torch.float32, torch.device(device))
            assert (tensor.shape, tensor.dtype, tensor.device.type) == (
                shape,
                torch.float32,
                "cpu",
            )
            assert tensor.untyped_storage().nbytes() == size
    asked: list[dict[str, Any]] = []
    with patch("torch.empty", lambda shape, **options: asked.append(options)):
        pinned_empty((2,), torch.float16, torch.device("cuda", 1))
    assert asked == [{"dtype": torch.float16, "pin_memory": True}]


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_a_host_that_cannot_pin_more_is_named_and_not_the_gpu(
    kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cudaHostAlloc fails with the words of a full GPU, so the advice was for the GPU's memory."""
    for name in (NEW, OLD):
        monkeypatch.delenv(name, raising=False)
    on_gpu = torch.device("cuda", 0)
    failing = patch("torch.empty", side_effect=kind(FULL))
    with failing, pytest.raises(HostMemoryError) as caught:
        pinned_empty((3, 10**8), torch.float32, on_gpu)
    assert str(caught.value) == "tried to allocate 2.1 GB of pinned host memory"
    assert is_out_of_memory(caught.value)
    assert is_host_memory(caught.value)
    assert requested_size(caught.value) == "2.1 GB"
    stage = RuntimeError("stage 0")
    stage.__cause__ = caught.value
    assert is_host_memory(stage)
    broken = patch("torch.empty", side_effect=kind("CUDA error: unspecified launch failure"))
    with broken, pytest.raises(kind, match="unspecified"):
        pinned_empty((3,), torch.float32, on_gpu)
