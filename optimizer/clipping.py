"""The gradient norm of each parameter, and the factor that clips the norm of all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norms(gradients: Sequence[Tensor]) -> list[float]:
    """Each gradient's sum of squares, from its norm in fp32."""
    if not gradients:
        return []
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
    values: list[float] = norms.double().square().tolist()
    return values


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of norm `norm` by, as torch.nn.utils.clip_grad_norm_ does."""
    if math.isinf(max_norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
