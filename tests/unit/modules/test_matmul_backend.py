"""Tests the choice of a matmul library, and `fp32_error`, which measures a matmul's error.

`fp32_error` must detect a matmul that is less exact than fp32, such as oneDNN's with AMX. The tests
make one torch operation less exact: they round its operands to the bits of bf16 or tf32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modules.matmul.backend import choose_matmul, fp32_error, use_matmul
from modules.matmul.cpu_info import CpuInfo
from tests.support.cpus import CPUS

BITS = {"bf16": 8, "tf32": 11, "fp32": 24}  # bits of a number's fraction, with the leading bit


@pytest.fixture(autouse=True)
def _torchs_default() -> Iterator[None]:
    yield
    use_matmul("default")


def test_amds_cpus_with_avx512_are_known_to_win() -> None:
    """Only AMD's CPUs with AVX-512 and without AMX get oneDNN."""
    for kind, cpu in CPUS.items():
        assert choose_matmul(cpu) == ("onednn" if kind in ("Zen 4", "Zen 5") else "default")
    for other in (CpuInfo("AuthenticAMD", "to come", True, True, True), CpuInfo()):
        assert choose_matmul(other) == "default"


def test_products_on_this_machine() -> None:
    """`use_matmul` sets torch's precision flag; only oneDNN with AMX is less exact than fp32."""
    mkldnn: Any = torch.backends.mkldnn
    use_matmul("onednn")
    assert mkldnn.matmul.fp32_precision == "bf16"
    assert (fp32_error() <= 1.0) == (not CpuInfo.of_this_machine().has_amx)
    use_matmul("default")
    assert mkldnn.matmul.fp32_precision == "ieee"
    assert 0.0 < fp32_error() <= 1.0


class Rounded(TorchDispatchMode):
    """Dispatch mode that rounds the fp32 operands of the torch call `operation` to `bits` bits."""

    def __init__(self, operation: str, bits: int) -> None:
        super().__init__()
        self.operation, self.bits, self.calls = operation, bits, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ == self.operation and args[-1].dtype == torch.float32:
            self.calls += 1
            args = (*args[:-2], *(self._round(factor) for factor in args[-2:]))
        return func(*args, **(kwargs or {}))

    def _round(self, x: Tensor) -> Tensor:
        fraction, exponent = torch.frexp(x)
        return torch.ldexp(torch.round(fraction * 2**self.bits) / 2**self.bits, exponent)


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("operation", ["addmm", "mm", "addmm_", "baddbmm"])
def test_products_of_fewer_bits_are_seen(operation: str, bits: int) -> None:
    with Rounded(operation, bits) as mode:
        error = fp32_error()
    assert mode.calls > 0
    assert error <= 1.0 if bits == BITS["fp32"] else error > 2.0
