"""Causal attention: torch's kernels, which never hold a mask or all scores, but on a CPU for short
sequences (`modules.attention.cpu`).

Dropout masks depend on the sequence alone (`modules.layers.dropout`), so each row is then run by
itself.
Where documents are kept apart, each of them is: its mask depends on the sequence and on its number
there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeds import derive_seed
from modules.attention.cpu import row_attention
from modules.attention.packed_documents import PackedDocuments
from modules.attention.sdpa import kernel_attention
from modules.attention.varlen import varlen_attention
from modules.layers.dropout import Keys
from modules.matmul.rounding import product_type


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    site: str,
    keys: Keys,
    documents: PackedDocuments | None,
) -> Tensor:
    """Causal softmax attention, scaled by the root of the head's size; inside `documents`.

    Tensors are (rows, heads, tokens, head size).
    """
    kind = product_type(query)
    query_, key, value = query.to(kind), key.to(kind), value.to(kind)
    if keys is not None and dropout > 0.0:
        out = _with_dropout(
            query_, key, value, dropout=dropout, site=site, keys=keys, documents=documents
        )
    elif documents is not None:
        out = varlen_attention(query_, key, value, documents)
    else:
        out = row_attention(query_, key, value)
    return out.to(query.dtype)


def _with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    site: str,
    keys: Sequence[int],
    documents: PackedDocuments | None,
) -> Tensor:
    """torch's kernel takes its mask from the device's default generator, which nothing else here
    draws from: it is seeded for each row or document."""
    rows = []
    for row, sequence_key in enumerate(keys):
        lengths, sites = _pieces(row, query.shape[2], site, documents)
        pieces = (tensor[row : row + 1].split(lengths, dim=2) for tensor in (query, key, value))
        attended = []
        for place, q, k, v in zip(sites, *pieces, strict=True):
            torch.manual_seed(derive_seed(sequence_key, place))
            attended.append(kernel_attention(q, k, v, dropout=dropout))
        rows.append(torch.cat(attended, dim=2))
    return torch.cat(rows)


def _pieces(
    row: int, tokens: int, site: str, documents: PackedDocuments | None
) -> tuple[list[int], list[str]]:
    """What of a row is attended to by itself: how many tokens each, and where its mask is drawn."""
    if documents is None:
        return [tokens], [site]
    lengths = documents.lengths_of_rows[row]
    return lengths, [f"{site}.{number}" for number in range(len(lengths))]
