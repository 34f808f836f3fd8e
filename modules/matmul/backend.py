"""The choice of a library for fp32 matmuls on a CPU; a check that its results are true fp32.

On x86, torch uses MKL by default. On AMD CPUs MKL runs AVX2 kernels, but oneDNN has AVX-512
kernels. torch 2.13 uses oneDNN for fp32 matmuls if `fp32_precision` is "bf16" and the CPU has
AVX-512 (`mkldnn_gemm` and `use_mkldnn_bf32_matmul` in torch's Matmul.cpp). The value "bf16"
permits oneDNN to compute in bf16, but oneDNN does so only with AMX. Without AMX the results of
oneDNN are fp32.
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
    """Returns "onednn" on AMD CPUs with AVX-512 and without AMX, where oneDNN is faster.

    On Intel CPUs, MKL is about 5% faster, and oneDNN would use AMX (bf16) if the CPU has it.
    """
    is_faster = cpu.vendor == AMD and cpu.has_avx512 and not cpu.has_amx
    return "onednn" if is_faster else "default"


def use_matmul(choice: Matmul) -> None:
    """Sets the library for all later fp32 matmuls of this process on the CPU.

    This is a process-wide setting of torch; torch ignores it on a CPU without AVX-512.
    """
    mkldnn: Any = torch.backends.mkldnn  # type checkers do not know its attributes
    mkldnn.matmul.fp32_precision = _PRECISION[choice]


@torch.no_grad()
def fp32_error() -> float:
    """Returns the largest error of the current fp32 matmuls, as a multiple of fp32's error bound.

    The reference is fp64. A result above 1 means that the matmuls are not true fp32.

    All operands are between 1 and 1 + 2^-11. tf32 and bf16 round them to 1, always in the same
    direction, so their error is about 2^-11 for any length of the sum. In fp32 the error of a sum
    of n positive products, in any order, is at most n u / (1 - n u), u = 2^-24 (Higham, Accuracy
    and Stability of Numerical Algorithms, section 3.1). For the longest sum here, this bound is a
    fourth of 2^-11.
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
    """Returns a @ b + c[0], like the forward of a linear layer (transposed weight, bias)."""
    return F.linear(a[None], b.t().contiguous(), c[0])


def _plain(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns a @ b, with `a` as a transposed view, like the backward of a linear layer."""
    return a.t().contiguous().t().mm(b)


def _added_in_place(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns c + a @ b; as with gradients, the product is added in place to a part of a buffer."""
    part = c.new_zeros(c.shape[0], c.shape[1] + 3)[:, 1:-2]
    return part.copy_(c).addmm_(a, b)


def _batched(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns c + a @ b twice, computed as one batch like the heads of attention."""
    return torch.baddbmm(torch.stack([c, c]), torch.stack([a, a]), torch.stack([b, b]))


_MATMULS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _linear,
    _plain,
    _added_in_place,
    _batched,
)
