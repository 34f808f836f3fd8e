"""Rotary position embeddings (Su et al., arXiv 2104.09864), in the two layouts in use.

A rotation acts on pairs of dimensions. In NeoX's layout a pair is dimension i of the first half and
dimension i of the second half; in GPT-J's layout a pair is two neighbouring dimensions. Backward
rotates by the opposite angle, so forward does not save a tensor for backward.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modules.layers.rope_scaling import RopeScaling


@dataclass(frozen=True, eq=False)
class Rotation:
    """The tables of cosines and sines (seq_len, pairs), and the dimensions that form the pairs.

    The method `at` returns a Rotation with tables (rows, 1, seq_len, pairs): every row has its own
    tables, which all its heads use. `width` is the number of dimensions that are rotated. Rotations
    are compared by identity, so that they can be keys of a dict.
    """

    cos: Tensor
    sin: Tensor
    first: slice
    second: slice
    width: int

    def at(self, positions: Tensor) -> "Rotation":
        """Returns the rotation for the given positions: int64 (rows, seq_len)."""
        cos, sin = (table[positions].unsqueeze(1) for table in (self.cos, self.sin))
        return replace(self, cos=cos, sin=sin)

    def apply(self, x: Tensor, out: Tensor, *, inverse: bool = False) -> None:
        """Writes the rotated `x` to `out`; both are (rows, heads, seq_len, head size)."""
        sign = -1.0 if inverse else 1.0
        first, second = x[..., self.first], x[..., self.second]
        out[..., self.width :] = x[..., self.width :]
        for half, other, other_sign in ((self.first, second, -sign), (self.second, first, sign)):
            rotated = torch.mul(x[..., half], self.cos, out=out[..., half])
            rotated.addcmul_(other, self.sin, value=other_sign)


@lru_cache(maxsize=16)
def rotation(
    seq_len: int,
    dim: int,
    base: float,
    *,
    pairs: bool,
    dtype: torch.dtype,
    device: torch.device,
    scaling: RopeScaling | None = None,
) -> Rotation:
    """Returns the rotation; its angle for pair i at position t is t / base^(2i/dim).

    Args:
        seq_len: the number of positions.
        dim: the number of rotated dimensions of a head.
        base: the base of the angles.
        pairs: whether the layout is GPT-J's (neighbours are pairs); else NeoX's (halves).
        dtype: the dtype of the tables; the angles are computed in fp32.
        device: the device of the tables.
        scaling: a change of the angles, for longer sequences than those of pretraining.
    """
    frequencies = 1.0 / (
        base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    )
    if scaling is not None:
        frequencies = scaling.scale(frequencies, base)
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.cos_factor != 1.0:
        cos, sin = cos * scaling.cos_factor, sin * scaling.cos_factor
    count = angles.shape[1]
    width = 2 * count
    first, second = slice(0, count), slice(count, width)
    if pairs:
        first, second = slice(0, width, 2), slice(1, width, 2)
    return Rotation(cos.to(dtype), sin.to(dtype), first, second, width)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Returns the rotated `x`, (rows, heads, seq_len, head size)."""
    out: Tensor = _Rotate.apply(x, rotation)  # type: ignore[no-untyped-call]
    return out


def split_and_rotate(fused: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Splits `fused` (..., 3 * head size) into queries, keys and values; rotates the first two."""
    query, key, value = _SplitAndRotate.apply(fused, rotation)  # type: ignore[no-untyped-call]
    return query, key, value


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        out = torch.empty_like(x)
        rotation.apply(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(gradient)
        ctx.rotation.apply(gradient, out, inverse=True)
        return out, None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        ctx.rotation = rotation
        query, key, value = fused.chunk(3, dim=-1)
        rotated = [
            torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key)
        ]
        rotation.apply(query, rotated[0])
        rotation.apply(key, rotated[1])
        return rotated[0], rotated[1], value.contiguous()

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        rows, heads, seq_len, size = query.shape
        d_fused = query.new_empty((rows, seq_len, heads, 3 * size)).transpose(1, 2)
        d_query, d_key, d_value = d_fused.chunk(3, dim=-1)
        ctx.rotation.apply(query, d_query, inverse=True)
        ctx.rotation.apply(key, d_key, inverse=True)
        d_value.copy_(value)
        return d_fused, None
