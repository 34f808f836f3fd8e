"""Tests the addition of a product to fp32 gradients: its operations on a GPU, and its result."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modules.matmul.rounding import add_matmul_

HALF = [torch.bfloat16, torch.float16]
ROWS, INNER, COLUMNS = 7, 300, 9


class Operations(TorchDispatchMode):
    """Records the names of operations on tensors, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def factors(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an fp32 sum, as a part of a buffer, and the two factors, the first transposed."""
    generator = torch.Generator().manual_seed(5)
    flat = torch.randn(16 + ROWS * COLUMNS, generator=generator)
    a, b = (torch.randn(INNER, size, generator=generator).to(dtype) for size in (ROWS, COLUMNS))
    return flat.to(device)[16:].view(ROWS, COLUMNS), a.to(device).t(), b.to(device)


@pytest.mark.parametrize("dtype", HALF)
def test_a_gpu_adds_half_precision_products_in_one_operation(dtype: torch.dtype) -> None:
    """A weight gradient of half precision on a GPU was rounded, and then added to the fp32 sum.

    The product took memory and time of its own: 12 to 22% of a step by calculation. "meta" stands
    for a GPU; only a GPU can show the numbers (check 6 of tests/gpu compares both forms).
    """
    total, a, b = factors(dtype, "meta")
    with Operations() as operations:
        add_matmul_(total, a, b)
    assert operations.names == ["aten.addmm.dtype_out"]


def test_older_versions_of_torch_add_the_rounded_product() -> None:
    """Before 2.11, torch has no addmm of half precision and an fp32 sum."""
    total, a, b = factors(torch.bfloat16, "meta")
    older = patch("modules.matmul.rounding._HAS_OUT_DTYPE", False)
    with older, Operations() as operations:
        add_matmul_(total, a, b)
    assert operations.names == ["aten.mm.default", "aten.add_.Tensor"]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_sum_is_that_of_fp64(dtype: torch.dtype) -> None:
    """On a CPU the error is at most that of one rounding to `dtype` and of sums in fp32."""
    total, a, b = factors(dtype, "cpu")
    expected = total.double() + a.double() @ b.double()
    add_matmul_(total, a, b)
    roundings = torch.finfo(dtype).eps + INNER * torch.finfo(torch.float32).eps
    allowed = roundings * (total.abs() + a.double().abs() @ b.double().abs())
    assert ((total - expected).abs() <= allowed).all()
