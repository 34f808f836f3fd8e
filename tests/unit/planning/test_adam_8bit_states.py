"""Tests that --plan knows the states of 8-bit Adam without bitsandbytes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.adam_8bit import Adam8bit
from planning.memory.fake_model import Adam8bitStates


@pytest.mark.parametrize("shape", [(5,), (4095,), (4096,), (64, 65), (300, 1000)])
def test_the_states_have_the_shapes_of_bitsandbytes(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    assert described(Adam8bitStates().empty_state(weight)) == described(
        Adam8bit().empty_state(weight)
    )


def test_all_weights_share_the_tables() -> None:
    for algorithm in (Adam8bitStates(), Adam8bit()):
        first, second = (algorithm.empty_state(torch.zeros(5000)) for _ in range(2))
        shared = {name for name in first if first[name].data_ptr() == second[name].data_ptr()}
        assert shared == {"qmap1", "qmap2"}


def described(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
