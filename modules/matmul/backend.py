"""Which library multiplies fp32 matrices on a CPU, and whether its products are true fp32.

torch's default is MKL, in its builds for x86, which runs AVX2 kernels on AMD's processors, where
oneDNN has AVX-512 ones. torch 2.13 gives fp32 products to oneDNN where `fp32_precision` is "bf16"
and the processor has AVX-512 (`mkldnn_gemm` and `use_mkldnn_bf32_matmul` in its Matmul.cpp). The
value lets oneDNN compute in bf16, which it does with AMX alone: without, its products are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.matmul.cpu_info import AMD, CpuInfo

Matmul = Literal["default", "onednn"]
MATMULS: tuple[Matmul, ...] = ("default", "onednn")

_PRECISION: dict[Matmul, str] = {"default": "ieee", "onednn": "bf16"}
_UNIT = 2.0**-24  # half the distance from 1 to the next fp32 number
_SHAPES = ((64, 96, 80), (128, 512, 256), (64, 2048, 64))  # rows, inner, columns


def choose_matmul(processor: CpuInfo) -> Matmul:
    """oneDNN where it is known to win, by what the processor is: on AMD's with AVX-512.

    On Intel's, MKL leads by some 5%, and oneDNN would use AMX where there is one.
    """
    wins = processor.vendor == AMD and processor.has_avx512 and not processor.has_amx
    return "onednn" if wins else "default"


def can_use_onednn(processor: CpuInfo) -> bool:
    """Whether torch can be told to give fp32 products to oneDNN on such a processor."""
    return processor.has_avx512


def use_matmul(choice: Matmul) -> None:
    """Lets this process's fp32 products on the CPU go through `choice` from now on.

    It is a setting of torch for the whole process. On a processor without AVX-512 torch ignores it.
    """
    mkldnn: Any = torch.backends.mkldnn  # its attributes are made at import: no checker knows them
    mkldnn.matmul.fp32_precision = _PRECISION[choice]


@torch.no_grad()
def fp32_error() -> float:
    """The largest error of products as they are computed now, in multiples of fp32's bound.

    Measured beside fp64; above 1 they are not true fp32.

    Operands lie between 1 and 1 + 2^-11, which tf32 and bf16 round to 1, all one way: such products
    are off by 2^-11, whatever their length. A sum of n positive products rounded in fp32, in any
    order, is off by n u / (1 - n u) at most, u = 2^-24 (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), a fourth of that for the longest here.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for rows, inner, columns in _SHAPES:
        a, b, c = (
            1 + torch.rand(shape, generator=generator) * 2**-11
            for shape in ((rows, inner), (inner, columns), (rows, columns))
        )
        allowed = (inner + 1) * _UNIT / (1 - (inner + 1) * _UNIT)
        for product in _PRODUCTS:
            exact = product(a.double(), b.double(), c.double())
            error = (product(a, b, c).double() - exact).abs() / exact
            worst = max(worst, error.max().item() / allowed)
    return worst


def _linear(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As a linear layer's forward: the weight transposed, a bias."""
    return F.linear(a[None], b.t().contiguous(), c[0])


def _plain(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As a linear layer's backward: the left operand transposed."""
    return a.t().contiguous().t().mm(b)


def _added_in_place(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As gradients are summed: onto what is there, in a part of a larger buffer."""
    part = c.new_zeros(c.shape[0], c.shape[1] + 3)[:, 1:-2]
    return part.copy_(c).addmm_(a, b)


def _batched(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As attention's heads."""
    return torch.baddbmm(torch.stack([c, c]), torch.stack([a, a]), torch.stack([b, b]))


_PRODUCTS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _linear,
    _plain,
    _added_in_place,
    _batched,
)
