"""Causal attention inside the documents of packed rows, without a mask.

On GPUs with flash attention, in half precision, one variable-length kernel computes all documents.
Otherwise the documents are sorted by length, and all documents of one length are computed together
as the rows of one batch. If every row is one document, the attention over complete rows is used.
The kernel also has sliding windows, so it computes complete rows with a window too.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from modules.attention.packed_documents import PackedDocuments
from modules.attention.window import window_attention


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: PackedDocuments,
    window: int | None = None,
) -> Tensor:
    """Returns causal softmax attention with scores scaled by 1 / sqrt(head size).

    Args:
        query: (rows, heads, seq_len, head size).
        key, value: (rows, key heads, seq_len, head size).
        documents: the documents of the rows.
        window: the number of the last keys that a query sees; None for all of its document.
    """
    rows, _, seq_len, _ = query.shape
    if documents.groups == [(rows, seq_len)]:
        return complete_row_attention(query, key, value, window)
    packed = _pack(query, key, value)
    if has_varlen_kernel(query, key, value):
        out = _attend_varlen(packed, documents.bounds, documents.longest, window)
    else:
        out = _attend_by_length(packed, documents, window)
    return out.view(rows, seq_len, *packed[0].shape[1:]).transpose(1, 2)


def complete_row_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Returns causal attention within each row; the arguments are as in `varlen_attention`."""
    rows, _, seq_len, _ = query.shape
    if query.device.type == "meta" and query.dtype != torch.float32:
        window = None  # in a dry run: the kernel saves the same tensors with and without a window
    if window is None or not has_varlen_kernel(query, key, value):
        return window_attention(query, key, value, window)
    packed, bounds = _pack(query, key, value), _row_bounds(rows, seq_len, query.device)
    out = _attend_varlen(packed, bounds, seq_len, window)
    return out.view(rows, seq_len, *packed[0].shape[1:]).transpose(1, 2)


@lru_cache(maxsize=4)
def _row_bounds(rows: int, seq_len: int, device: torch.device) -> Tensor:
    """Returns the start of each row in the packed tokens, like `PackedDocuments.bounds`."""
    return torch.arange(rows + 1, dtype=torch.int32, device=device) * seq_len


def _pack(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors]


def has_varlen_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns whether torch's `varlen_attn` supports these tensors.

    `varlen_attn` needs flash attention and a head size that is a multiple of 8. torch's check for
    flash attention also accepts other head sizes, because `scaled_dot_product_attention` pads them.
    """
    params = SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1])
    return can_use_flash_attention(params) and query.shape[-1] % 8 == 0


def _attend_varlen(
    packed: Sequence[Tensor], bounds: Tensor, longest: int, window: int | None
) -> Tensor:
    """Returns attention inside all documents, computed by one kernel.

    `packed` has queries, keys and values, each (rows * seq_len, heads, head size); the result has
    the shape of the queries. The kernel's window counts the keys before the query itself.
    """
    # The import is here because it also imports torch.compile's modules, which takes 1.6 s.
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = packed
    earlier = -1 if window is None else window - 1
    out = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        window_size=(earlier, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor), "no auxiliary output was requested"
    return out


def _attend_by_length(
    packed: Sequence[Tensor], documents: PackedDocuments, window: int | None
) -> Tensor:
    """Returns attention inside all documents; documents of equal length are computed together.

    The shapes are as in `_attend_varlen`.
    """
    order, inverse = documents.by_length, documents.original_order
    sizes = [count * length for count, length in documents.groups]
    parts = [_reorder(tensor, order, inverse).split(sizes) for tensor in packed]
    attended = []
    for group, part in zip(documents.groups, zip(*parts, strict=True), strict=True):
        query, key, value = (_as_rows(tensor, *group) for tensor in part)
        attended.append(window_attention(query, key, value, window).transpose(1, 2).flatten(0, 1))
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
