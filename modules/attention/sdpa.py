"""torch's kernels for causal attention, which never hold a mask or all scores.

torch's device "meta" has none, and would hold all scores. It stands for a GPU where a run is
rehearsed without one, so that there the kernels of GPUs are called, which keep their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def kernel_attention(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Causal softmax attention, scaled by the root of the head's size.

    Tensors are (rows, heads, tokens, head size). `dropout` takes its mask from the device's default
    generator.
    """
    if query.device.type == "meta":
        return _as_on_gpus(query, key, value, dropout)
    return scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)


def _as_on_gpus(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """By flash attention, which takes half precision alone; else by the memory-efficient kernel."""
    ops = torch.ops.aten
    out: Tensor
    if query.dtype == torch.float32:
        out, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, None, True, dropout, True
        )
    else:
        out, *_ = ops._scaled_dot_product_flash_attention(query, key, value, dropout, True, False)
    return out
