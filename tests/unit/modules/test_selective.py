"""Tests the bytes that a block keeps with selective recompute, and when they are freed.

That the bits are those of the other modes is tested where they are: for all models and split
backward in test_grad_buffer, for documents and dropout in test_packed_documents.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from modules.layers.selective import Recompute, recompute_selectively
from modules.registry import MODELS
from modules.stage_model import StageModel
from planning.memory.live_bytes import LiveBytes
from tests.support.models import make_hf

ROWS, TOKENS, HIDDEN, INNER, LAYERS = 2, 24, 32, 128, 2
INNER_SIZE: dict[str, dict[str, Any]] = {
    "gptneox": {"intermediate_size": INNER, "num_hidden_layers": LAYERS},
    "gptj": {"n_inner": INNER, "n_layer": LAYERS},
    "llama": {"intermediate_size": INNER, "num_hidden_layers": LAYERS},
}
NORMS = {"gptneox": 2, "gptj": 1, "llama": 2}  # in a block


def make_blocks(name: str, dtype: torch.dtype) -> StageModel:
    config = make_hf(name, **INNER_SIZE[name]).config
    blocks = StageModel(MODELS[name].load(), config, range(1, 1 + LAYERS), device="cpu")
    for parameter in blocks.parameters():
        parameter.data = torch.randn(parameter.shape).mul_(0.1).to(dtype)
    return blocks


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gptneox", torch.float32), ("gptj", torch.bfloat16), ("llama", torch.float32)],
)
def test_a_block_keeps_no_output_of_a_norm_or_an_activation(name: str, dtype: torch.dtype) -> None:
    """Exactly these bytes are saved; without a backward, they are freed with the output.

    In a first version, operations that save their own output (attention) and this output kept each
    other alive until the garbage collector ran.
    """
    blocks, held = make_blocks(name, dtype), dict[Recompute, int]()
    modes: list[Recompute] = ["none", "selective"]
    for mode in modes:
        with LiveBytes() as live, without_collector():
            x = torch.randn(ROWS, TOKENS, HIDDEN, dtype=dtype).requires_grad_()
            blocks(x, None)  # counts the weights, and makes tables that stay
            before = live.current["cpu"]
            out = blocks(x, None, recompute=mode)
            held[mode] = live.current["cpu"] - before
            del out
            assert live.current["cpu"] == before
    numbers = LAYERS * ROWS * TOKENS * (NORMS[name] * HIDDEN + INNER)
    assert held["none"] - held["selective"] == numbers * dtype.itemsize
    assert held["selective"] > 0


def test_an_output_is_computed_again_once_for_all_that_saved_it() -> None:
    """GPT-J's norm has four users: three projections of attention and one of the MLP."""
    blocks = make_blocks("gptj", torch.float32)
    x = torch.randn(ROWS, TOKENS, HIDDEN).requires_grad_()
    with patch.object(
        nn.LayerNorm, "forward", autospec=True, side_effect=nn.LayerNorm.forward
    ) as f:
        out = blocks(x, None, recompute="selective")
        assert f.call_count == LAYERS
        torch.autograd.backward(out.sum())
        assert f.call_count == 2 * LAYERS


class Doubled(nn.Module):
    """A block that doubles the output of its activation in place, or not at all."""

    def __init__(self, act: nn.Module, *, doubles: bool) -> None:
        super().__init__()
        self.act, self.doubles = act, doubles
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.first(x))
        if self.doubles:
            with torch.no_grad():
                out.mul_(2.0)
        product: Tensor = self.second.weight @ out[1:].t()  # saves this view
        return product


# The backward of ReLU needs its output, so the output may not be changed.
@pytest.mark.parametrize(
    ("act", "doubles"),
    [(nn.GELU(), False), (nn.GELU(), True), (nn.SiLU(), True), (nn.ReLU(), False)],
)
def test_views_and_changed_outputs_and_other_modules_give_the_same_gradients(
    act: nn.Module, doubles: bool
) -> None:
    """A view of an output is computed again; an output that was changed in place is saved."""
    torch.manual_seed(1)
    block, x = Doubled(act, doubles=doubles), torch.randn(6, 8)
    gradients = []
    for selective in (False, True):
        block.zero_grad()
        if selective:
            with recompute_selectively(block):
                out = block(x)
        else:
            out = block(x)
        torch.autograd.backward(out.square().sum())
        gradients.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not block.act._forward_hooks
