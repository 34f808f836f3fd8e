"""Activation functions of feed-forward layers, by their names in a config.

This file has the activations of the published models. The other activations come
from `transformers.activations`. Its import takes 1.8 s on each rank, so it is imported only if it
is needed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

# GELU's tanh approximation as one kernel, which saves only its input for backward. transformers'
# `gelu_new` and `gelu_fast` compute the same function, with constants that are equal in fp32, by
# about eight operators. These save more tensors and, in half precision, round each result.
GELU_TANH = partial(nn.GELU, approximate="tanh")

FUSED: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_fast": GELU_TANH,
    "gelu_new": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "silu": nn.SiLU,
}


def make_activation(name: str) -> nn.Module:
    """Returns the activation `name`; `check_activation` must have accepted the name."""
    activation: nn.Module = FUSED[name]() if name in FUSED else _all_activations()[name]
    return activation


def check_activation(field_name: str, activation: str) -> None:
    """Raises ValueError for an activation that is unknown or has weights."""
    if activation in FUSED:
        return
    activations = _all_activations()
    if activation not in activations:
        raise ValueError(f"{field_name} is {activation!r}, unknown to transformers' ACT2FN")
    if list(activations[activation].parameters()):
        raise ValueError(f"{field_name} is {activation!r}, which has weights: not supported")


def _all_activations() -> Any:
    from transformers.activations import ACT2FN  # see the docstring of this file

    return ACT2FN
