"""Tests the project's activation functions against those of transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2FN

from modules.layers.activation import FUSED, make_activation

VALUES = 3 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
TANH = sorted(set(FUSED) - {"gelu"})


def output_and_gradient(activation: Callable[[Tensor], Tensor], values: Tensor) -> list[Tensor]:
    x = values.clone().requires_grad_()
    y = activation(x)
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    return [y.detach(), x.grad]


def errors(name: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Returns our largest error and transformers', for the output and for the gradient.

    The reference is transformers' activation in fp64.
    """
    theirs, values = ACT2FN[name], VALUES.to(dtype)
    exact = output_and_gradient(theirs, values.double())
    results = [output_and_gradient(f, values) for f in (make_activation(name), theirs)]
    ours, hf = (
        [(r.double() - e).abs().max().item() for r, e in zip(result, exact, strict=True)]
        for result in results
    )
    return list(zip(ours, hf, strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_outputs_and_gradients_are_those_of_transformers(name: str) -> None:
    """In fp32 the errors are a few roundings: 2^-24 of terms up to 12, the largest value."""
    (output, _), (gradient, _) = errors(name, torch.float32)
    assert output < 2.0**-19
    assert gradient < 2.0**-19, "1 - tanh^2 cancels, and its error has a factor of up to 10"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUSED)
def test_half_precision_errs_no_more_than_transformers(name: str, dtype: torch.dtype) -> None:
    for ours, theirs in errors(name, dtype):
        assert 0.0 < ours <= 1.5 * theirs


@pytest.mark.parametrize("name", TANH)
def test_only_the_input_is_saved_for_backward(name: str) -> None:
    """A block's activations were almost twice as large as necessary.

    `gelu_new` and `gelu_fast` were computed by about eight operators as in transformers, and
    autograd kept four and seven tensors of the feed-forward part's width.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = VALUES.clone().requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = make_activation(name)(x)
    assert y.shape == x.shape
    assert sum(saved.values()) == x.nbytes
