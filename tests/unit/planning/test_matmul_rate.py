"""Tests the matmul rate with a device of known rate and a simulated clock."""

from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from planning.cluster.matmul_rate import matmul_rate

CPU = torch.device("cpu")


class KnownDevice:
    """A device that computes a thousand multiply-adds per second."""

    def __init__(self) -> None:
        self.now, self.rows = 0.0, [0]
        self.operands: tuple[Tensor, Tensor] | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        assert x.dtype == weight.dtype == torch.bfloat16
        self.rows.append(x.shape[0])
        self.operands = x, weight
        self.now += x.shape[0] * weight.numel() / 1e3
        return x


@pytest.fixture
def device() -> Iterator[KnownDevice]:
    device = KnownDevice()
    clock = SimpleNamespace(monotonic=lambda: device.now, perf_counter=lambda: device.now)
    with (
        patch("planning.cluster.matmul_rate.time", clock),
        patch("planning.cluster.matmul_rate.linear", device.linear),
    ):
        yield device


def rate(rows: int, budget: float) -> float:
    return matmul_rate(
        rows=rows, inputs=2, outputs=5, dtype=torch.bfloat16, device=CPU, budget=budget
    )


def test_all_rows_where_there_is_time(device: KnownDevice) -> None:
    assert rate(100, 1000.0) == pytest.approx(1e3)
    assert max(device.rows) == 100


def test_fewer_rows_on_a_slow_device(device: KnownDevice) -> None:
    """The measurement uses fewer rows, because a matmul of all rows would take 100 s."""
    assert rate(10_000, 10.0) == pytest.approx(1e3)
    assert max(device.rows) < 1000
    assert device.now < 12.0


def test_numbers_are_random_and_the_same_in_every_call(device: KnownDevice) -> None:
    """A GPU multiplied ones 13% faster than a model's numbers, because ones need less power."""
    operands = []
    for _ in range(2):
        matmul_rate(
            rows=64, inputs=64, outputs=128, dtype=torch.bfloat16, device=CPU, budget=10_000.0
        )
        assert device.operands is not None
        operands.append(device.operands)
    for first, second in zip(*operands, strict=True):
        assert torch.equal(first, second)
        numbers = first.double()
        assert abs(numbers.mean().item()) < 0.1, "5 standard deviations of the mean of 4096"
        assert abs(numbers.std().item() - 1.0) < 0.1
        assert len(first.unique(dim=0)) == len(first), "no two rows are equal"


def test_a_real_device() -> None:
    """The rate of a real CPU in fp32, bf16 and fp16 is plausible: 1e5 to 1e15 multiply-adds/s."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = matmul_rate(rows=32, inputs=64, outputs=128, dtype=dtype, device=CPU, budget=0.1)
        assert 1e5 < found < 1e15
