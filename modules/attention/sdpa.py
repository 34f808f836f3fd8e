"""torch's kernels for causal attention, which never hold a mask or all scores.

torch has no such kernel for the device "meta" and would hold all scores. In a dry run, "meta"
stands for a GPU, so the GPU kernels are called there: they tell their own shapes.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Returns causal softmax attention with scores scaled by 1 / sqrt(head size).

    All tensors are (rows, heads, seq_len, head size). The mask of `dropout` is drawn from the
    device's default generator.
    """
    if query.device.type == "meta":
        return _gpu_kernel(query, key, value, dropout)
    return scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)


def _gpu_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Calls flash attention, or in fp32, which it does not support, the memory-efficient kernel."""
    ops = torch.ops.aten
    out: Tensor
    if query.dtype == torch.float32:
        out, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, None, True, dropout, True
        )
    else:
        out, *_ = ops._scaled_dot_product_flash_attention(query, key, value, dropout, True, False)
    return out
