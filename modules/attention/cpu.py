"""Causal attention over short sequences on a CPU, for training.

torch's own CPU kernel works in small tiles, well below what the processor can do, and computes the
probabilities again in backward. While they are few beside a block's other activations, it is faster
to keep them, and to make each block of queries one batched product over all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modules.attention.sdpa import kernel_attention

QUERIES = 64  # of a block
KEPT_TOKENS = 4  # times the head size: then the probabilities are an eighth of the activations


def is_short(query: Tensor) -> bool:
    """Whether to attend here: `query` is (rows, heads, tokens, head size)."""
    return query.device.type == "cpu" and query.shape[2] <= KEPT_TOKENS * query.shape[3]


def row_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention, as `short_attention`: here or, where that is better, by torch."""
    if is_short(query):
        return short_attention(query, key, value)
    return kernel_attention(query, key, value)


def short_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention, scaled by the root of the head's size.

    Tensors are (rows, heads, tokens, head size).
    """
    out: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
        q = q * query.shape[-1] ** -0.5
        rows, heads, tokens, size = query.shape
        out = query.new_empty((rows, tokens, heads, size)).transpose(
            1, 2
        )  # as the next layer reads
        kept = []
        for here, seen in _blocks(q.shape[1]):
            scores = torch.bmm(q[:, here], k[:, seen].transpose(1, 2))
            scores[:, :, here].add_(future(here.stop - here.start, q.dtype))
            kept.append(torch.softmax(scores, -1, out=scores))
            out[:, :, here] = torch.bmm(kept[-1], v[:, seen]).view(rows, heads, -1, size)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, *kept = ctx.saved_tensors
        given = gradient.flatten(0, 1)
        shift = (out * gradient).sum(-1, keepdim=True).flatten(0, 1)
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (here, seen), p in zip(_blocks(q.shape[1]), kept, strict=True):
            d = given[:, here]
            to_v[:, seen].baddbmm_(p.transpose(1, 2), d)
            scores = torch.bmm(d, v[:, seen].transpose(1, 2)).sub_(shift[:, here]).mul_(p)
            to_q[:, here] = torch.bmm(scores, k[:, seen])
            to_k[:, seen].baddbmm_(scores.transpose(1, 2), q[:, here])
        to_q.mul_(q.shape[-1] ** -0.5)
        shape = gradient.shape
        return to_q.view(shape), to_k.view(shape), to_v.view(shape)


def _blocks(tokens: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys that they see."""
    for start in range(0, tokens, QUERIES):
        stop = min(start + QUERIES, tokens)
        yield slice(start, stop), slice(0, stop)


@lru_cache(maxsize=4)
def future(queries: int, dtype: torch.dtype) -> Tensor:
    """-inf where a key comes after its query, for a block's own keys."""
    return torch.full((queries, queries), -torch.inf, dtype=dtype).triu(1)
