"""Causal attention in a sliding window, by blocks of queries, each with its keys only.

A query sees the last `window` keys, its own position included. No kernel of torch for CPUs has a
window, so each block of queries has a mask; all blocks share one or two masks. On GPUs this is the
way in fp32 and with dropout only: `modules.attention.varlen` has a kernel with a window.
"""

from functools import lru_cache

import torch
from torch import Tensor

from modules.attention.cpu import row_attention
from modules.attention.sdpa import sdpa_attention

QUERY_BLOCK = 256  # queries that share one mask


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, *, dropout: float = 0.0
) -> Tensor:
    """Returns causal softmax attention within each row, over the last `window` keys of each query.

    Args:
        query: (rows, heads, seq_len, head size).
        key, value: (rows, key heads, seq_len, head size).
        window: None if queries see all earlier keys.
        dropout: the probability of dropping an attention weight, by the default generator.
    """
    seq_len = query.shape[2]
    if window is not None and window < seq_len:
        return _by_blocks(query, key, value, window, dropout)
    if dropout > 0.0:
        return sdpa_attention(query, key, value, dropout=dropout)
    return row_attention(query, key, value)


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, window: int, dropout: float) -> Tensor:
    """Returns the attention; the first `window` queries see all earlier keys and need no mask."""
    seq_len = query.shape[2]
    q, k, v = (tensor[:, :, :window] for tensor in (query, key, value))
    parts = [window_attention(q, k, v, None, dropout=dropout)]
    for start in range(window, seq_len, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, seq_len)
        mask = window_mask(stop - start, window, query.dtype, query.device)
        keys = slice(start - window, stop)
        parts.append(
            sdpa_attention(
                query[:, :, start:stop], key[:, :, keys], value[:, :, keys],
                dropout=dropout, mask=mask,
            )
        )  # fmt: skip
    return torch.cat(parts, 2)


@lru_cache(maxsize=8)
def window_mask(queries: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a mask (queries, window + queries): 0 where a query sees a key, else -inf.

    The first key is `window` positions before the first query, so no query sees it. It is there
    because kernels want a number of keys that is a multiple of 8.
    """
    mask = torch.full((queries, window + queries), -torch.inf, dtype=dtype, device=device)
    return mask.triu(window + 1) + mask.tril(0)
