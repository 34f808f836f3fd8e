"""Causal attention, with or without dropout, over complete rows or inside packed documents.

The dropout mask of a row must not depend on the other rows of the microbatch (see
`modules.layers.dropout`), so attention with dropout runs row by row, and each row has its own seed.
In packed rows it runs document by document. The seed of a document depends on the row's dropout key
and on the document's number in the row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeds import derive_seed
from modules.attention.packed_documents import PackedDocuments
from modules.attention.varlen import complete_row_attention, varlen_attention
from modules.attention.window import window_attention
from modules.layers.dropout import Keys
from modules.matmul.rounding import matmul_dtype


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    site: str,
    keys: Keys,
    documents: PackedDocuments | None,
    window: int | None = None,
) -> Tensor:
    """Returns causal softmax attention with scores scaled by 1 / sqrt(head size).

    Args:
        query: (rows, heads, seq_len, head size).
        key, value: (rows, key heads, seq_len, head size); neighbouring query heads share a key
            head.
        dropout: the probability of dropping an attention weight.
        site: the name of this attention in the model; the dropout masks depend on it.
        keys: the dropout key of each row; None for no dropout.
        documents: the documents of the rows, if a token attends only to its own document;
            None if attention covers complete rows.
        window: how many of the last keys a query sees, its own position included; None for all. A
            window that is as long as the longest sequence costs nothing.

    Returns:
        (rows, heads, seq_len, head size).
    """
    longest = query.shape[2] if documents is None else documents.longest
    if window is not None and window >= longest:
        window = None
    dtype = matmul_dtype(query)
    q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
    if keys is not None and dropout > 0.0:
        out = _dropout_attention(
            q, k, v, dropout, window, site=site, keys=keys, documents=documents
        )
    elif documents is not None:
        out = varlen_attention(q, k, v, documents, window)
    else:
        out = complete_row_attention(q, k, v, window)
    return out.to(query.dtype)


def _dropout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    window: int | None,
    *,
    site: str,
    keys: Sequence[int],
    documents: PackedDocuments | None,
) -> Tensor:
    """Returns attention with dropout, computed row by row or document by document.

    torch's kernel draws its mask from the device's default generator. This generator is seeded
    before each row or document; no other code in this project uses it.
    """
    rows = []
    for row, sequence_key in enumerate(keys):
        lengths, sites = _segments(row, query.shape[2], site, documents)
        segments = (tensor[row : row + 1].split(lengths, dim=2) for tensor in (query, key, value))
        attended = []
        for segment_site, q, k, v in zip(sites, *segments, strict=True):
            _seed_default_generator(derive_seed(sequence_key, segment_site), query.device)
            attended.append(window_attention(q, k, v, window, dropout=dropout))
        rows.append(torch.cat(attended, dim=2))
    return torch.cat(rows)


def _seed_default_generator(seed: int, device: torch.device) -> None:
    """Seeds the device's default generator, which torch's kernel uses.

    This does not call torch.manual_seed, because torch.manual_seed also formats one stack trace for
    every other device type. Formatting takes longer than the attention of a short row.
    """
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _segments(
    row: int, seq_len: int, site: str, documents: PackedDocuments | None
) -> tuple[list[int], list[str]]:
    """Returns the lengths of a row's segments (documents), and the dropout site of each segment."""
    if documents is None:
        return [seq_len], [site]
    lengths = documents.lengths_of_rows[row]
    return lengths, [f"{site}.{number}" for number in range(len(lengths))]
