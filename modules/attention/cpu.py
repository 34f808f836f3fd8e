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

    `query` is (rows, heads, seq_len, head size). `key` and `value` may have fewer heads; then
    several query heads share a key head, and their queries are the rows of one matmul.
    """
    out: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
        rows, heads, seq_len, size = query.shape
        # Scores are fp32 also in half precision: the softmax multiplies their rounding error.
        wide = torch.promote_types(query.dtype, torch.float32)
        q, wide_k = q.to(wide) * size**-0.5, k.to(wide)
        # The memory layout is the layout of the next layer's input.
        out = query.new_empty((rows, seq_len, heads, size)).transpose(1, 2)
        probabilities = []
        for queries, keys in _blocks(seq_len):
            scores = torch.bmm(_shared(q[:, queries], k), wide_k[:, keys].transpose(1, 2))
            scores = scores.view(len(q), -1, keys.stop)
            scores[:, :, queries].add_(causal_mask(queries.stop - queries.start, wide))
            p = torch.softmax(scores, -1, out=scores).to(query.dtype)
            mixed = torch.bmm(_shared(p, k), v[:, keys])
            out[:, :, queries] = mixed.view(rows, heads, -1, size)
            probabilities.append(p)
        ctx.save_for_backward(q.to(query.dtype), k, v, *probabilities)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *probabilities = ctx.saved_tensors
        d_out, scale = gradient.flatten(0, 1), q.shape[-1] ** -0.5
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        blocks = list(zip(_blocks(q.shape[1]), probabilities, strict=True))
        for (queries, keys), p in reversed(blocks):
            d, p = _shared(d_out[:, queries], k), _shared(p, k)
            d_scores = torch.bmm(d, v[:, keys].transpose(1, 2))
            torch._softmax_backward_data(d_scores, p, -1, p.dtype, grad_input=d_scores)
            product = torch.bmm(d_scores, k[:, keys]).view(len(q), -1, q.shape[-1])
            torch.mul(product, scale, out=d_q[:, queries])
            # The last block has all keys: its products overwrite d_k and d_v.
            beta = 0 if queries.stop == q.shape[1] else 1
            d_k[:, keys].baddbmm_(d_scores.transpose(1, 2), _shared(q[:, queries], k), beta=beta)
            d_v[:, keys].baddbmm_(p.transpose(1, 2), d, beta=beta)
        shape, key_shape = gradient.shape, (gradient.shape[0], -1, *gradient.shape[2:])
        return d_q.view(shape), d_k.view(key_shape), d_v.view(key_shape)


def _shared(x: Tensor, k: Tensor) -> Tensor:
    """Returns `x` (rows * heads, queries, n) as the rows of one matmul for each key head of `k`.

    The shape is (rows * key heads, heads per key head * queries, n).
    """
    return x.reshape(len(k), -1, x.shape[-1])


def _blocks(seq_len: int) -> Iterator[tuple[slice, slice]]:
    """Yields blocks of queries, each with all keys up to the position of its last query."""
    for start in range(0, seq_len, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, seq_len)
        yield slice(start, stop), slice(0, stop)


@lru_cache(maxsize=4)
def causal_mask(queries: int, dtype: torch.dtype) -> Tensor:
    """Returns a mask (queries, queries): -inf where the key comes after the query, else 0."""
    return torch.full((queries, queries), -torch.inf, dtype=dtype).triu(1)
