"""The library for fp32 matmuls on a CPU, and a check that its results are true fp32.

torch's builds for x86 use MKL by default, which runs AVX2 kernels on AMD CPUs; oneDNN has AVX-512
kernels there. torch 2.13 uses oneDNN for fp32 matmuls where `fp32_precision` is "bf16" and the CPU
has AVX-512 (`mkldnn_gemm` and `use_mkldnn_bf32_matmul` in its Matmul.cpp). This value permits
oneDNN to compute in bf16, which it does only with AMX: without AMX its results are fp32.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.matmul.cpu_info import AMD, CpuInfo

Matmul = Literal["default", "onednn"]

_PRECISION: dict[Matmul, str] = {"default": "ieee", "onednn": "bf16"}
_UNIT = 2.0**-24  # half the distance from 1 to the next fp32 number
_SHAPES = ((64, 96, 80), (128, 512, 256), (64, 2048, 64))  # rows, inner, columns


def choose_matmul(cpu: CpuInfo) -> Matmul:
    """Chooses oneDNN where it is known to be faster: on AMD CPUs with AVX-512.

    On Intel CPUs, MKL is some 5% faster, and oneDNN would use AMX where it exists.
    """
    is_faster = cpu.vendor == AMD and cpu.has_avx512 and not cpu.has_amx
    return "onednn" if is_faster else "default"


def use_matmul(choice: Matmul) -> None:
    """Makes `choice` compute the fp32 matmuls of this process on the CPU from now on.

    It is a process-wide setting of torch, which torch ignores on a CPU without AVX-512.
    """
    mkldnn: Any = torch.backends.mkldnn  # attributes made at import, unknown to type checkers
    mkldnn.matmul.fp32_precision = _PRECISION[choice]


@torch.no_grad()
def fp32_error() -> float:
    """Returns the largest error of matmuls as computed now, in multiples of the bound of fp32.

    The reference is fp64; above 1 the results are not true fp32.

    Operands lie between 1 and 1 + 2^-11, which tf32 and bf16 round to 1, all in one direction: the
    error of such matmuls is 2^-11, whatever their length. The error of a sum of n positive products
    rounded in fp32, in any order, is at most n u / (1 - n u), u = 2^-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1), a fourth of 2^-11 for the longest here.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for rows, inner, columns in _SHAPES:
        a, b, c = (
            1 + torch.rand(shape, generator=generator) * 2**-11
            for shape in ((rows, inner), (inner, columns), (rows, columns))
        )
        bound = (inner + 1) * _UNIT / (1 - (inner + 1) * _UNIT)
        for matmul in _MATMULS:
            exact = matmul(a.double(), b.double(), c.double())
            error = (matmul(a, b, c).double() - exact).abs() / exact
            worst = max(worst, error.max().item() / bound)
    return worst


def _linear(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Computes a linear layer's forward: the weight transposed, a bias."""
    return F.linear(a[None], b.t().contiguous(), c[0])


def _plain(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Computes a linear layer's backward: the left operand transposed."""
    return a.t().contiguous().t().mm(b)


def _added_in_place(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Adds as gradients are summed: in place, in a part of a larger buffer."""
    part = c.new_zeros(c.shape[0], c.shape[1] + 3)[:, 1:-2]
    return part.copy_(c).addmm_(a, b)


def _batched(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Computes the heads of attention."""
    return torch.baddbmm(torch.stack([c, c]), torch.stack([a, a]), torch.stack([b, b]))


_MATMULS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _linear,
    _plain,
    _added_in_place,
    _batched,
)
