"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), as the models of the Llama kind compute it."""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divides x (..., size) by its root mean square, and multiplies it by `weight` (size).

    The division is computed in fp32 and rounded to the type of `x`; then follows the product with
    the weight, in that type. (torch's RMSNorm rounds only after the product.) Backward needs only
    the input and one number for each of its rows.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # in fp32, because `scale` is fp32
        d_weight = (gradient * normed.to(x.dtype)).flatten(0, -2).sum(0)
        d_normed = (gradient * weight).to(normed.dtype)
        shift = (d_normed * normed).mean(-1, keepdim=True)
        d_x = d_normed.addcmul_(normed, shift, value=-1.0).mul_(scale)
        return d_x.to(x.dtype), d_weight, None
