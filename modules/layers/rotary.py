"""Rotary position embeddings (Su et al., arXiv 2104.09864), in the two layouts in use.

NeoX turns the first half of the rotated dimensions against the second; GPT-J turns neighbours.
Turning back is turning by the opposite angle, so backward needs nothing that forward had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Tables made once: cosines and sines (tokens, pairs), and where in a head each pair lies.

    Of `at`, they are (rows, 1, tokens, pairs), for all heads of each row.
    """

    cos: Tensor
    sin: Tensor
    first: slice
    second: slice
    width: int

    def at(self, positions: Tensor) -> Rotation:
        """For tokens at other positions than theirs in the row: int64 (rows, tokens)."""
        cos, sin = (table[positions].unsqueeze(1) for table in (self.cos, self.sin))
        return replace(self, cos=cos, sin=sin)

    def turn(self, x: Tensor, out: Tensor, *, back: bool = False) -> None:
        """Writes `x` (rows, heads, tokens, head size), turned, into `out` of that shape."""
        sign = -1.0 if back else 1.0
        first, second = x[..., self.first], x[..., self.second]
        out[..., self.width :] = x[..., self.width :]
        for here, other, towards in ((self.first, second, -sign), (self.second, first, sign)):
            turned = torch.mul(x[..., here], self.cos, out=out[..., here])
            turned.addcmul_(other, self.sin, value=towards)


@lru_cache(maxsize=16)
def rotation(
    num_tokens: int,
    dim: int,
    base: float,
    *,
    pairs: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Rotation:
    """Position t turns pair i by t / base^(2i/dim), computed in fp32; tables in `dtype`.

    `pairs`: the GPT-J layout, else NeoX's.
    """
    inverse = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    angles = positions[:, None] * inverse
    count = angles.shape[1]
    width = 2 * count
    first, second = slice(0, count), slice(count, width)
    if pairs:
        first, second = slice(0, width, 2), slice(1, width, 2)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), first, second, width)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """`x` (rows, heads, tokens, head size), turned."""
    out: Tensor = _Rotate.apply(x, rotation)  # type: ignore[no-untyped-call]
    return out


def split_and_rotate(fused: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, turned, and values, out of `fused` (rows, heads, tokens, 3 * head size)."""
    query, key, value = _SplitAndRotate.apply(fused, rotation)  # type: ignore[no-untyped-call]
    return query, key, value


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        out = torch.empty_like(x)
        rotation.turn(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(gradient)
        ctx.rotation.turn(gradient, out, back=True)
        return out, None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        ctx.rotation = rotation
        query, key, value = fused.chunk(3, dim=-1)
        turned = [
            torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key)
        ]
        rotation.turn(query, turned[0])
        rotation.turn(key, turned[1])
        return turned[0], turned[1], value.contiguous()

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        rows, heads, tokens, size = query.shape
        whole = query.new_empty((rows, tokens, heads, 3 * size)).transpose(1, 2)
        to_query, to_key, to_value = whole.chunk(3, dim=-1)
        ctx.rotation.turn(query, to_query, back=True)
        ctx.rotation.turn(key, to_key, back=True)
        to_value.copy_(value)
        return whole, None
