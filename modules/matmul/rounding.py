"""Matmuls in the compute type, also on CPUs without matmul instructions for half precision.

Such a CPU multiplies half precision much more slowly than fp32. So its matmuls are computed in fp32
and rounded once. Products of half-precision numbers are exact in fp32, so the results differ from
those of matmul instructions only by the order of the sums.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from modules.matmul.cpu_info import CpuInfo

_HAS_OUT_DTYPE = torch.torch_version.TorchVersion(torch.__version__) >= "2.11"  # addmm's argument


@cache
def rounds_matmul(dtype: torch.dtype, device_type: str) -> bool:
    """Returns whether this type of device computes matmuls of `dtype` in fp32 and rounds them."""
    return device_type == "cpu" and not CpuInfo.of_this_machine().has_fast_matmul(dtype)


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the type in which matmuls of `tensor` are computed."""
    rounds = rounds_matmul(tensor.dtype, tensor.device.type)
    return torch.float32 if rounds else tensor.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x @ weight.T + bias; the shapes are (..., inputs), (outputs, inputs), (outputs)."""
    dtype = matmul_dtype(x)
    if dtype == x.dtype:
        return functional.linear(x, weight, bias)
    wide_bias = None if bias is None else bias.to(dtype)
    return functional.linear(x.to(dtype), weight.to(dtype), wide_bias).to(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Returns the product a @ b of two matrices."""
    dtype = matmul_dtype(a)
    return a @ b if dtype == a.dtype else (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total` (fp32) in place.

    Where one operation does this, the product is not rounded before the addition: if it is computed
    in fp32, and on a GPU. There, cuBLAS multiplies half precision and adds to fp32. "meta" stands
    for a GPU in a dry run. torch has this form of addmm since 2.11, and only for GPUs.
    """
    dtype = matmul_dtype(a)
    if dtype == total.dtype:
        total.addmm_(a.to(dtype), b.to(dtype))
    elif total.device.type in ("cuda", "meta") and _HAS_OUT_DTYPE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)
