"""Rotary position embeddings (Su et al., arXiv 2104.09864), in the two layouts in use.

NeoX turns the first half of the rotated dimensions against the second; GPT-J turns neighbours.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def rotary_angles(num_tokens: int, dim: int, base: float, device: torch.device) -> Tensor:
    """Angles in fp32, (num_tokens, ceil(dim / 2)): position t turns pair i by t / base^(2i/dim)."""
    inverse = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    return positions[:, None] * inverse


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """NeoX layout. `x` is (..., tokens, head size); its first 2 * angles.shape[1] entries turn."""
    width = 2 * angles.shape[1]
    turned, rest = x[..., :width], x[..., width:]
    cos = angles.cos().repeat(1, 2).to(x.dtype)
    sin = angles.sin().repeat(1, 2).to(x.dtype)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """GPT-J layout. `x` is (..., tokens, head size); its first 2 * angles.shape[1] entries turn."""
    width = 2 * angles.shape[1]
    turned, rest = x[..., :width], x[..., width:]
    cos = angles.cos().repeat_interleave(2, dim=1).to(x.dtype)
    sin = angles.sin().repeat_interleave(2, dim=1).to(x.dtype)
    even, odd = turned[..., ::2], turned[..., 1::2]
    turned = turned * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin
    return torch.cat((turned, rest), dim=-1)
