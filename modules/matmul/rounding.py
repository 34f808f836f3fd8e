"""Products of matrices in the compute type, also where a processor has none in half precision.

A processor without instructions for half precision multiplies it far more slowly than fp32. There
products are made in fp32 and rounded once: products of half-precision numbers are exact in fp32, so
only the order of the sums is another.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from modules.matmul.cpu_info import has_fast_products


@cache
def rounds_products(dtype: torch.dtype, device: str) -> bool:
    """Whether products of `dtype` are made in fp32 and rounded, on this kind of device."""
    return device == "cpu" and not has_fast_products(dtype)


def product_type(tensor: Tensor) -> torch.dtype:
    """The type in which products of `tensor` are made."""
    rounds = rounds_products(tensor.dtype, tensor.device.type)
    return torch.float32 if rounds else tensor.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., inputs) times weight (outputs, inputs), transposed, plus bias (outputs)."""
    kind = product_type(x)
    if kind == x.dtype:
        return functional.linear(x, weight, bias)
    wide = None if bias is None else bias.to(kind)
    return functional.linear(x.to(kind), weight.to(kind), wide).to(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices."""
    kind = product_type(a)
    return a @ b if kind == a.dtype else (a.to(kind) @ b.to(kind)).to(a.dtype)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total`, which is fp32: in one go where the product is made in fp32."""
    kind = product_type(a)
    if kind == total.dtype:
        total.addmm_(a.to(kind), b.to(kind))
    else:
        total.add_(a @ b)
