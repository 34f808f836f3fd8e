"""Causal attention over short sequences on a CPU, for training.

torch's CPU kernel works in small tiles, which is slow, and computes the probabilities again in
backward. For short sequences the probabilities are much smaller than a layer's other activations.
In this case it is faster to save the probabilities, and to compute each block of queries as one
batched matmul over all heads.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modules.attention.sdpa import sdpa_attention

QUERY_BLOCK = 64  # queries in one batched matmul
# The longest sequence / head size. At this length the probabilities are 1/8 of the activations.
MAX_LENGTH_PER_SIZE = 4


def is_short(query: Tensor) -> bool:
    """Returns whether `short_attention` suits `query` (rows, heads, seq_len, head size)."""
    return query.device.type == "cpu" and query.shape[2] <= MAX_LENGTH_PER_SIZE * query.shape[3]


def row_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns causal attention within each row, computed by the faster of two implementations."""
    if is_short(query):
        return short_attention(query, key, value)
    return sdpa_attention(query, key, value)


def short_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns causal softmax attention with scores scaled by 1 / sqrt(head size).

    All tensors are (rows, heads, seq_len, head size).
    """
    out: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
        q = q * query.shape[-1] ** -0.5
        rows, heads, seq_len, size = query.shape
        # The memory layout is the layout of the next layer's input.
        out = query.new_empty((rows, seq_len, heads, size)).transpose(1, 2)
        probabilities = []
        for queries, keys in _blocks(q.shape[1]):
            scores = torch.bmm(q[:, queries], k[:, keys].transpose(1, 2))
            scores[:, :, queries].add_(causal_mask(queries.stop - queries.start, q.dtype))
            p = torch.softmax(scores, -1, out=scores)
            out[:, :, queries] = torch.bmm(p, v[:, keys]).view(rows, heads, -1, size)
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, out, *probabilities)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, *probabilities = ctx.saved_tensors
        d_out = gradient.flatten(0, 1)
        shift = (out * gradient).sum(-1, keepdim=True).flatten(0, 1)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), p in zip(_blocks(q.shape[1]), probabilities, strict=True):
            d = d_out[:, queries]
            d_v[:, keys].baddbmm_(p.transpose(1, 2), d)
            d_scores = torch.bmm(d, v[:, keys].transpose(1, 2)).sub_(shift[:, queries]).mul_(p)
            d_q[:, queries] = torch.bmm(d_scores, k[:, keys])
            d_k[:, keys].baddbmm_(d_scores.transpose(1, 2), q[:, queries])
        d_q.mul_(q.shape[-1] ** -0.5)
        shape = gradient.shape
        return d_q.view(shape), d_k.view(shape), d_v.view(shape)


def _blocks(seq_len: int) -> Iterator[tuple[slice, slice]]:
    """Yields blocks of queries, each with all keys up to the position of its last query."""
    for start in range(0, seq_len, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, seq_len)
        yield slice(start, stop), slice(0, stop)


@lru_cache(maxsize=4)
def causal_mask(queries: int, dtype: torch.dtype) -> Tensor:
    """Returns a mask (queries, queries): -inf where the key comes after the query, else 0."""
    return torch.full((queries, queries), -torch.inf, dtype=dtype).triu(1)
