"""Causal attention inside documents, several of which lie in a row; no mask is ever made.

On GPUs with flash attention, in half precision, one kernel goes over all documents. Elsewhere those
of one length are attended to together, as if they were rows: sorting documents by their length puts
them side by side. Documents that are whole rows are rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.varlen import varlen_attn

from modules.attention.cpu import row_attention
from modules.attention.packed_documents import PackedDocuments

CAUSAL = (-1, 0)  # varlen_attn's window: all that come before, none that come after


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments
) -> Tensor:
    """Causal softmax attention, scaled by the root of the head's size.

    Tensors are (rows, heads, tokens, head size).
    """
    rows, _, tokens, _ = query.shape
    if documents.groups == [(rows, tokens)]:
        return row_attention(query, key, value)
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    attend = _attend_at_once if has_kernel(query, key, value) else _attend_by_length
    return attend(packed, documents).view(rows, tokens, *packed[0].shape[1:]).transpose(1, 2)


def has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `varlen_attn` takes such tensors: flash attention does, and heads are a multiple of 8
    (torch pads others for the flash attention of rows alone)."""
    params = SDPAParams(query, key, value, None, 0.0, True, False)
    return can_use_flash_attention(params) and query.shape[-1] % 8 == 0


def _attend_at_once(packed: Sequence[Tensor], documents: PackedDocuments) -> Tensor:
    """`packed`: queries, keys and values (rows * tokens, heads, head size); so is what returns."""
    query, key, value = packed
    bounds, longest = documents.bounds, documents.longest
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=CAUSAL)
    assert isinstance(out, Tensor), "no auxiliary output was asked for"
    return out


def _attend_by_length(packed: Sequence[Tensor], documents: PackedDocuments) -> Tensor:
    """As `_attend_at_once`."""
    order, back = documents.by_length, documents.back_in_place
    sizes = [count * length for count, length in documents.groups]
    parts = [_reorder(tensor, order, back).split(sizes) for tensor in packed]
    attended = [
        row_attention(*(_as_rows(part, *group) for part in qkv)).transpose(1, 2).flatten(0, 1)
        for group, qkv in zip(documents.groups, zip(*parts, strict=True), strict=True)
    ]
    return _reorder(torch.cat(attended), back, order)


def _as_rows(packed: Tensor, count: int, length: int) -> Tensor:
    """(count * length, heads, head size) to (count, heads, length, head size)."""
    return packed.view(count, length, *packed.shape[1:]).transpose(1, 2)


def _reorder(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x[order], whose gradient is put back in place by `back`, without adding."""
    out: Tensor = _Reorder.apply(x, order, back)  # type: ignore[no-untyped-call]
    return out


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.back), None, None
