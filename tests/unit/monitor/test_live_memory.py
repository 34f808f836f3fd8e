"""Tests LiveBytes, which counts bytes of live tensors, against known sizes and the allocator."""

import pytest
import torch
from torch import Tensor, nn

from optimizer.adam_8bit import Adam8bit
from planning.memory.live_bytes import LiveBytes, peak_resident
from tests.support.memory import peak_bytes


def test_storages_count_once_and_until_they_are_freed() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100)[2:5]
        assert live.current["cpu"] == 4000
        third = torch.ones(500, dtype=torch.float16)
        assert live.current["cpu"] == 5000
        del first, third
        assert (live.current["cpu"], live.peak["cpu"]) == (4000, 5000)
        live.reset_peak()
        del second
        assert (live.current["cpu"], live.peak["cpu"]) == (0, 4000)


def test_what_was_there_before_counts_from_its_first_use() -> None:
    weight = torch.zeros(1000)
    with LiveBytes() as live:
        assert live.current["cpu"] == 0
        weight.mul_(2.0)
        assert live.current["cpu"] == 4000
        live.see([weight, None, torch.zeros(2)])
        assert live.current["cpu"] == 4000


def test_a_storage_that_grows_counts_as_it_is() -> None:
    with LiveBytes() as live:
        out = torch.empty(0)
        torch.cat([torch.zeros(100), torch.zeros(100)], out=out)
        assert live.current["cpu"] == 800


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_training_is_that_of_the_allocator(dtype: torch.dtype) -> None:
    """While a layer trains, the peak of LiveBytes is within 2% of that of torch's allocator.

    The peaks differ because LiveBytes does not count what an operator creates and frees before the
    operator ends. oneDNN is off, because its bf16 matmul uses scratch memory on some CPUs.
    """
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True).to(dtype)
    given = torch.randn(4, 128, 64, dtype=dtype)

    def run() -> None:
        held: list[Tensor] = [layer(given) for _ in range(2)]
        for out in held:
            out.sum().backward()
        layer.zero_grad()

    with torch.backends.mkldnn.flags(enabled=False):
        run()
        with LiveBytes() as live:
            live.see([*layer.parameters(), given])
            before = live.current["cpu"]
            run()
        _, allocated = peak_bytes(run)
    assert live.peak["cpu"] - before == pytest.approx(allocated, rel=0.02)


def test_what_bitsandbytes_makes_on_the_way_is_counted() -> None:
    """LiveBytes counts what a bitsandbytes update allocates, at least 4 times the weight's size."""
    weight, algorithm = torch.zeros(2**20), Adam8bit()
    state = algorithm.empty_state(weight)
    gradient = torch.ones_like(weight)

    def run() -> None:
        with torch.no_grad():
            algorithm.step(
                [weight], [gradient], [state], factor=1.0, lr=0.1, weight_decay=0.0, update=0
            )

    run()
    with LiveBytes() as live:
        live.see([weight, gradient, *state.values()])
        before = live.current["cpu"]
        run()
    found = live.peak["cpu"] - before
    assert found == pytest.approx(peak_bytes(run)[1], rel=0.02)
    assert found >= 4 * weight.nbytes


def test_the_resident_peak_only_rises() -> None:
    """The process's peak memory rises with a new tensor, and stays when the tensor is freed."""
    before = peak_resident()
    filled = torch.ones((before + 64 * 2**20) // 4)
    assert peak_resident() >= before + 32 * 2**20
    del filled
    assert peak_resident() >= before + 32 * 2**20
