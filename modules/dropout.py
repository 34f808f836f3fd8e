"""Dropout whose masks depend on (seed, update, sequence, layer) alone.

A pipeline replays a block in backward, a resumed run replays nothing, and another (P, R) gives the
same sequence to another process: all must draw the same mask. So no generator runs on from call to
call: each row of a microbatch has a key, and each mask is drawn from that key and its site's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Keys = Sequence[int] | None


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts` and their order, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class KeyedDropout(nn.Module):
    """Inverted dropout of probability `p`; `site` names the place in the model, layer included."""

    def __init__(self, p: float, site: str) -> None:
        super().__init__()
        self.p = p
        self.site = site

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        """`x` is (rows, ...), with one key a row; None for no dropout."""
        if keys is None or self.p == 0.0:
            return x
        mask = torch.empty_like(x)
        generator = torch.Generator(device=x.device)
        for row, key in enumerate(keys):
            generator.manual_seed(derive_seed(key, self.site))
            mask[row].bernoulli_(1.0 - self.p, generator=generator)
        return x * mask / (1.0 - self.p) if self.p < 1.0 else x * 0.0


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, site: str, keys: Keys
) -> Tensor:
    """Causal softmax attention, scaled by the root of the head's size.

    Tensors are (rows, heads, tokens, head size). torch's kernel takes its dropout mask from the
    device's default generator, which nothing else here draws from: it is seeded for each row.
    """
    if keys is None or dropout == 0.0:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    rows = []
    for row, sequence_key in enumerate(keys):
        torch.manual_seed(derive_seed(sequence_key, site))
        one = slice(row, row + 1)
        rows.append(
            functional.scaled_dot_product_attention(
                query[one], key[one], value[one], is_causal=True, dropout_p=dropout
            )
        )
    return torch.cat(rows)
