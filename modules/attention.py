"""Causal attention: torch's kernels, which never hold a mask or all scores, but on a CPU for short
sequences (`modules.short_attention`).

Dropout masks depend on the sequence alone (`modules.dropout`), so each row is then run by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modules.dropout import Keys, derive_seed
from modules.rounded_products import product_type
from modules.short_attention import is_short, short_attention


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, site: str, keys: Keys
) -> Tensor:
    """Causal softmax attention, scaled by the root of the head's size.

    Tensors are (rows, heads, tokens, head size). torch's kernel takes its dropout mask from the
    device's default generator, which nothing else here draws from: it is seeded for each row.
    """
    kind = product_type(query)
    query_, key, value = query.to(kind), key.to(kind), value.to(kind)
    if keys is None or dropout == 0.0:
        if is_short(query):
            return short_attention(query_, key, value).to(query.dtype)
        return scaled_dot_product_attention(query_, key, value, is_causal=True).to(query.dtype)
    rows = []
    for row, sequence_key in enumerate(keys):
        torch.manual_seed(derive_seed(sequence_key, site))
        one = slice(row, row + 1)
        rows.append(
            scaled_dot_product_attention(
                query_[one], key[one], value[one], is_causal=True, dropout_p=dropout
            )
        )
    return torch.cat(rows).to(query.dtype)
