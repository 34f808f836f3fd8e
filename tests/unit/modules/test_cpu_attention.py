"""Tests attention over short sequences against torch's attention, in fp64 and fp32."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modules.attention.cpu import MAX_LENGTH_PER_SIZE, QUERY_BLOCK, is_short, short_attention

ROWS, HEADS, SIZE = 2, 3, 64
LONGEST = MAX_LENGTH_PER_SIZE * SIZE


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (ROWS, HEADS, tokens, SIZE)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4)]


def run(attend: Callable[..., Tensor], qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Returns the output, and the gradients of query, key and value."""
    given = [tensor.clone().requires_grad_() for tensor in qkv]
    out = attend(*given)
    torch.autograd.backward(out, gradient)
    grads = [tensor.grad for tensor in given if tensor.grad is not None]
    return [out.detach(), *grads]


@pytest.mark.parametrize(
    "tokens", [1, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 1, 200, LONGEST]
)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_torchs_attention(tokens: int, dtype: torch.dtype, allowed: float) -> None:
    """Results differ from torch's only by rounding, since sums of up to 256 terms are reordered."""
    *qkv, gradient = inputs(tokens, dtype)
    found = run(short_attention, qkv, gradient)
    expected = run(partial(scaled_dot_product_attention, is_causal=True), qkv, gradient)
    assert is_short(qkv[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < allowed * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_torchs(dtype: torch.dtype, factor: float, size: int) -> None:
    """Errors of the output and of all gradients are at most 1.5 times those of torch's kernel.

    Scores were once rounded to half precision, and the softmax multiplied their errors: errors were
    1.2 to 2.1 times those of torch's kernel with scores of up to 5 (factor 1), and 3.6 to 7 times
    with scores of up to 50 (factor 3). torch's kernel has fp32 scores.
    """
    shape, generator = (ROWS, HEADS, 200, size), torch.Generator().manual_seed(size)
    given = [factor * torch.randn(shape, generator=generator) for _ in range(4)]
    *qkv, gradient = [tensor.to(dtype) for tensor in given]
    sdpa = partial(scaled_dot_product_attention, is_causal=True)
    exact = run(sdpa, [tensor.double() for tensor in qkv], gradient.double())
    ours, theirs = (run(attend, qkv, gradient) for attend in (short_attention, sdpa))
    for found, torchs, expected in zip(ours, theirs, exact, strict=True):
        torchs_error = (torchs - expected).square().mean().sqrt()
        assert (found - expected).square().mean().sqrt() <= 1.5 * torchs_error


def test_the_future_is_not_seen() -> None:
    """If query, key and value change from position 130 on, outputs before it keep the same bits."""
    query, key, value, _ = inputs(200, torch.float32)
    before = short_attention(query, key, value)
    for tensor in (query, key, value):
        tensor[:, :, 130:] = 1e4
    after = short_attention(query, key, value)
    assert torch.equal(before[:, :, :130], after[:, :, :130])
    assert not torch.equal(before[:, :, 130:], after[:, :, 130:])


def test_long_sequences_are_left_to_torch() -> None:
    assert not is_short(torch.empty(1, 1, LONGEST + 1, SIZE))
