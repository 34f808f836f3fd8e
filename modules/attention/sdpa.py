"""Causal attention with torch's fused kernels; these kernels store no mask and no score matrix.

In a dry run, the device "meta" represents a GPU. But for "meta" tensors, torch's attention function
does not choose a fused kernel; it allocates the score matrix. The fused GPU kernels accept "meta"
tensors and return the right shapes, so this file calls these kernels directly for "meta".
"""

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention


def disable_cudnn_attention() -> None:
    """Keeps torch from choosing cuDNN's attention, for the rest of this process.

    On H100, torch 2.11 prefers cuDNN's kernel to flash attention. cuDNN makes a new plan for each
    new shape, and packed documents have hundreds of lengths. Also, `--plan` counts the tensors that
    flash attention saves.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Returns softmax attention with scores scaled by 1 / sqrt(head size).

    The number of query heads is a multiple of the number of key heads; torch's kernels for CPUs and
    flash attention need no copies of the keys for that. Only the memory-efficient kernel does. The
    device's default generator draws the dropout mask.

    Args:
        query: (rows, heads, queries, head size).
        key, value: (rows, key heads, keys, head size).
        dropout: the probability of dropping an attention weight.
        mask: (queries, keys), added to the scores; None for causal attention.
    """
    on_gpu, grouped = query.device.type != "cpu", key.shape[1] != query.shape[1]
    if on_gpu and grouped and not _uses_flash(query, key, value, dropout, mask):
        copies = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
    if query.device.type == "meta":
        return _gpu_kernel(query, key, value, dropout, mask)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _uses_flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, mask: Tensor | None
) -> bool:
    """Returns whether flash attention computes this; it lacks fp32 and masks, and old GPUs lack it.

    In a dry run a GPU has it.
    """
    if query.dtype == torch.float32 or mask is not None:
        return False
    grouped = key.shape[1] != query.shape[1]
    params = SDPAParams(query, key, value, None, dropout, True, grouped)
    return query.device.type == "meta" or can_use_flash_attention(params)


def _gpu_kernel(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, mask: Tensor | None
) -> Tensor:
    """Calls flash attention or, for fp32 and masks, the memory-efficient kernel."""
    ops = torch.ops.aten
    out: Tensor
    if _uses_flash(query, key, value, dropout, mask):
        out, *_ = ops._scaled_dot_product_flash_attention(query, key, value, dropout, True, False)
        return out
    bias = None if mask is None else mask.expand(*query.shape[:2], *mask.shape)
    out, *_ = ops._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout, mask is None
    )
    return out
