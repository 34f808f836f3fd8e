"""Causal attention inside the documents of packed rows, without a mask.

On GPUs with flash attention, in half precision, one variable-length kernel computes all documents.
Otherwise the documents are sorted by length, and all documents of one length are computed together
as the rows of one batch. If every row is one document, the attention over complete rows is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from modules.attention.cpu import row_attention
from modules.attention.packed_documents import PackedDocuments

CAUSAL = (-1, 0)  # varlen_attn's window: all earlier tokens, no later ones


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments
) -> Tensor:
    """Returns causal softmax attention with scores scaled by 1 / sqrt(head size).

    All tensors are (rows, heads, seq_len, head size).
    """
    rows, _, seq_len, _ = query.shape
    if documents.groups == [(rows, seq_len)]:
        return row_attention(query, key, value)
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    attend = _attend_varlen if has_varlen_kernel(query, key, value) else _attend_by_length
    return attend(packed, documents).view(rows, seq_len, *packed[0].shape[1:]).transpose(1, 2)


def has_varlen_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns whether torch's `varlen_attn` supports these tensors.

    `varlen_attn` needs flash attention and a head size that is a multiple of 8. torch's check for
    flash attention also accepts other head sizes, because `scaled_dot_product_attention` pads them.
    """
    params = SDPAParams(query, key, value, None, 0.0, True, False)
    return can_use_flash_attention(params) and query.shape[-1] % 8 == 0


def _attend_varlen(packed: Sequence[Tensor], documents: PackedDocuments) -> Tensor:
    """Returns attention inside all documents, computed by one kernel.

    `packed` has queries, keys and values, each (rows * seq_len, heads, head size); the result has
    the same shape.
    """
    # The import is here because it also imports torch.compile's modules, which takes 1.6 s.
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = packed
    bounds, longest = documents.bounds, documents.longest
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=CAUSAL)
    assert isinstance(out, Tensor), "no auxiliary output was requested"
    return out


def _attend_by_length(packed: Sequence[Tensor], documents: PackedDocuments) -> Tensor:
    """Returns attention inside all documents; documents of equal length are computed together.

    The shapes are as in `_attend_varlen`.
    """
    order, inverse = documents.by_length, documents.original_order
    sizes = [count * length for count, length in documents.groups]
    parts = [_reorder(tensor, order, inverse).split(sizes) for tensor in packed]
    attended = [
        row_attention(*(_as_rows(part, *group) for part in qkv)).transpose(1, 2).flatten(0, 1)
        for group, qkv in zip(documents.groups, zip(*parts, strict=True), strict=True)
    ]
    return _reorder(torch.cat(attended), inverse, order)


def _as_rows(packed: Tensor, count: int, length: int) -> Tensor:
    """Returns `packed` (count * length, heads, head size) as (count, heads, length, head size)."""
    return packed.view(count, length, *packed.shape[1:]).transpose(1, 2)


def _reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Returns x[order]; backward indexes with `inverse` instead of a scatter-add."""
    out: Tensor = _Reorder.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.inverse), None, None
