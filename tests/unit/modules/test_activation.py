"""Tests that the project's activation functions give the same bits as those of transformers."""

import pytest
import torch
from transformers.activations import ACT2FN

from modules.layers.activation import PUBLISHED, make_activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs_and_gradients_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    values = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = []
    for activation in (make_activation(name), ACT2FN[name]):
        x = values.to(dtype).requires_grad_()
        y = activation(x)
        y.sum().backward()
        assert x.grad is not None
        found.append((y, x.grad))
    (ours, our_gradient), (theirs, their_gradient) = found
    assert torch.equal(ours, theirs)
    assert torch.equal(our_gradient, their_gradient)
