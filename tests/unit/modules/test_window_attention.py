"""Tests attention with grouped heads and sliding windows against a dense computation in fp64."""

from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from modules.attention.causal import causal_attention
from modules.attention.cpu import short_attention
from modules.attention.sdpa import sdpa_attention
from modules.attention.window import window_attention

ROWS, HEADS, KEY_HEADS, SIZE = 2, 6, 2, 8


def inputs(tokens: int, key_heads: int = KEY_HEADS) -> list[Tensor]:
    """Returns query, key, value and the gradient of the output, in fp64."""
    generator = torch.Generator().manual_seed(tokens)
    heads = (HEADS, key_heads, key_heads, HEADS)
    return [
        torch.randn(ROWS, n, tokens, SIZE, generator=generator, dtype=torch.float64) for n in heads
    ]


def dense(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """Computes attention from its definition: query i sees keys i - window + 1 to i."""
    key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
    place = torch.arange(query.shape[2])
    distance = place[:, None] - place
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    scores = (query @ key.mT / SIZE**0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


def check_same(attend: object, expected: object, material: list[Tensor], *options: object) -> None:
    """Asserts that outputs and the gradients of all inputs are equal but for fp64 rounding."""
    *qkv, gradient = material
    results = []
    for run in (attend, expected):
        given = [tensor.clone().requires_grad_() for tensor in qkv]
        assert callable(run)
        out = run(*given, *options)
        torch.autograd.backward(out, gradient)
        results.append([out.detach(), *(tensor.grad for tensor in given)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("tokens", [1, 20, 130])
def test_query_heads_share_a_key_head(key_heads: int, tokens: int) -> None:
    """130 tokens are three blocks of `short_attention`."""
    for attend in (short_attention, sdpa_attention):
        check_same(attend, dense, inputs(tokens, key_heads))


@pytest.mark.parametrize(
    ("tokens", "window"), [(40, 1), (40, 9), (33, 32), (40, 39), (9, 9), (5, 9)]
)
@pytest.mark.parametrize("key_heads", [2, 6])
def test_a_query_sees_the_last_keys(tokens: int, window: int, key_heads: int) -> None:
    """Queries without a mask, full blocks of masked queries and a shorter last block occur."""
    with patch("modules.attention.window.QUERY_BLOCK", 8):
        check_same(window_attention, dense, inputs(tokens, key_heads), window)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_keys_before_the_window_are_not_seen(dropout: float) -> None:
    """If keys and values up to 19 change, outputs from 28 on keep their bits: the window is 9."""
    query, key, value, _ = (tensor.float() for tensor in inputs(40))

    def attend() -> Tensor:
        return causal_attention(
            query, key, value, dropout=dropout, site="here", keys=[1, 2], documents=None, window=9
        )

    before, again = attend(), attend()
    assert torch.equal(before, again)
    for tensor in (key, value):
        tensor[:, :, :20] = 1e4
    after = attend()
    assert torch.equal(before[:, :, 28:], after[:, :, 28:])
    assert (before != after)[:, :, 20:28].any((0, 1, 3)).all()


def test_a_window_as_long_as_the_sequence_costs_nothing() -> None:
    query, key, value, _ = (tensor.float() for tensor in inputs(40))
    options: dict[str, Any] = {"dropout": 0.0, "site": "", "keys": None, "documents": None}
    plain = causal_attention(query, key, value, **options)
    with patch("modules.attention.window._by_blocks", side_effect=AssertionError("a mask")):
        assert torch.equal(causal_attention(query, key, value, **options, window=40), plain)


@pytest.mark.parametrize(
    ("dtype", "masked"), product([torch.float32, torch.bfloat16], [False, True])
)
def test_gpu_kernels_of_a_dry_run_accept_grouped_heads_and_masks(
    dtype: torch.dtype, masked: bool
) -> None:
    """On "meta", which stands for a GPU, output and gradients have the shapes of the inputs."""
    query, key, value, gradient = (x.to("meta", dtype) for x in inputs(16))
    given = [tensor.requires_grad_() for tensor in (query, key, value)]
    mask = torch.zeros(16, 16, device="meta", dtype=dtype) if masked else None
    out = sdpa_attention(*given, mask=mask)
    torch.autograd.backward(out, gradient)
    assert out.shape == query.shape
    for tensor in given:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
