"""Causal attention with torch's fused kernels; these kernels store no mask and no score matrix.

In a dry run, the device "meta" represents a GPU. But for "meta" tensors, torch's attention function
does not choose a fused kernel; it allocates the score matrix. The fused GPU kernels accept "meta"
tensors and return the right shapes, so this file calls these kernels directly for "meta".
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def disable_cudnn_attention() -> None:
    """Keeps torch from choosing cuDNN's attention, for the rest of this process.

    On H100, torch 2.11 prefers cuDNN's kernel to flash attention. cuDNN makes a new plan for each
    new shape, and packed documents have hundreds of lengths. Also, `--plan` counts the tensors that
    flash attention saves.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Returns causal softmax attention with scores scaled by 1 / sqrt(head size).

    All tensors are (rows, heads, seq_len, head size). The device's default generator draws the
    dropout mask.
    """
    if query.device.type == "meta":
        return _gpu_kernel(query, key, value, dropout)
    return scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)


def _gpu_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Calls the memory-efficient kernel for fp32, else flash attention, which lacks fp32."""
    ops = torch.ops.aten
    out: Tensor
    if query.dtype == torch.float32:
        out, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, None, True, dropout, True
        )
    else:
        out, *_ = ops._scaled_dot_product_flash_attention(query, key, value, dropout, True, False)
    return out
