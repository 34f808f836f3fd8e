"""Tests which of torch's attention kernels a run may use on a GPU."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from modules.attention.causal import causal_attention
from modules.attention.sdpa import sdpa_attention
from training.device import choose_device


def test_a_run_on_a_gpu_does_not_use_cudnn_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since torch 2.11, cuDNN's attention is preferred on H100: a new plan for each new length."""
    parallel: Any = SimpleNamespace(use_cuda=True, cuda_id=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    backends: Any = torch.backends.cuda
    backends.enable_cudnn_sdp(True)  # torch's default, which another test may have changed
    try:
        assert choose_device(parallel, use_offload=False, ranks_here=1) == torch.device("cuda", 0)
        assert not backends.cudnn_sdp_enabled()
        assert backends.flash_sdp_enabled()
        assert backends.mem_efficient_sdp_enabled()
    finally:
        backends.enable_cudnn_sdp(True)


def test_dropout_seeds_the_generator_of_its_gpu_alone() -> None:
    """Each row or document seeded all devices of all types, and formatted stack traces for that."""
    cuda = [torch.Generator(), torch.Generator()]
    before = cuda[0].get_state()
    with (
        patch("modules.attention.causal.torch.cuda.default_generators", cuda),
        patch("modules.attention.window.sdpa_attention", lambda q, k, v, dropout: v),
        patch("torch.manual_seed", side_effect=AssertionError("seeds every device")),
    ):
        seeds = []
        for key in (7, 8, 7):
            query: Any = OnGpu(torch.ones(1, 2, 3, 4))
            attend(query, key)
            seeds.append(cuda[1].initial_seed())
    assert seeds[0] == seeds[2] != seeds[1]
    assert torch.equal(cuda[0].get_state(), before)


@pytest.mark.parametrize(
    ("flash", "dtype", "copied"),
    [
        (True, torch.bfloat16, False),
        (False, torch.float16, True),
        (True, torch.float32, True),
    ],
)
def test_keys_are_copied_only_where_flash_attention_is_missing(
    flash: bool, dtype: torch.dtype, copied: bool
) -> None:
    """With grouped heads and without flash attention, torch would allocate the score matrix."""
    query: Any = OnGpu(torch.ones(1, 4, 3, 8, dtype=dtype))
    key: Any = OnGpu(torch.ones(1, 2, 3, 8, dtype=dtype))
    with (
        patch("modules.attention.sdpa.can_use_flash_attention", return_value=flash),
        patch("modules.attention.sdpa.scaled_dot_product_attention") as kernel,
    ):
        sdpa_attention(query, key, key)
    _, *given = kernel.call_args.args
    assert [tensor.shape[1] for tensor in given] == ([4, 4] if copied else [2, 2])
    assert kernel.call_args.kwargs["enable_gqa"] == (not copied)


class OnGpu(torch.Tensor):
    """A tensor in host memory that says it is on the second GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 1)


def attend(tensor: torch.Tensor, key: int) -> torch.Tensor:
    return causal_attention(
        tensor, tensor, tensor, dropout=0.1, site="here", keys=[key], documents=None
    )
