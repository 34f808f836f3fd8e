"""Activation functions of feed-forward layers, by their names in a config.

This file has the three activations of the published GPT-J and GPT-NeoX models. The other
activations come from `transformers.activations`. Its import takes 1.8 s on each rank, so it is
imported only if it is needed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SCALE = math.sqrt(2.0 / math.pi)


class GELUNew(nn.Module):
    """GELU's tanh approximation, computed in the same order as in transformers' `gelu_new`."""

    def forward(self, x: Tensor) -> Tensor:
        # Keep this one expression: its order decides the order in which backward adds gradients.
        return 0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * torch.pow(x, 3.0))))


class GELUFast(nn.Module):
    """GELU's tanh approximation, computed in the same order as in transformers' `gelu_fast`."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


PUBLISHED: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_fast": GELUFast,
    "gelu_new": GELUNew,
}


def make_activation(name: str) -> nn.Module:
    """Returns the activation `name`; `check_activation` must have accepted the name."""
    activation: nn.Module = PUBLISHED[name]() if name in PUBLISHED else _all_activations()[name]
    return activation


def check_activation(field_name: str, activation: str) -> None:
    """Raises ValueError for an activation that is unknown or has weights."""
    if activation in PUBLISHED:
        return
    activations = _all_activations()
    if activation not in activations:
        raise ValueError(f"{field_name} is {activation!r}, unknown to transformers' ACT2FN")
    if list(activations[activation].parameters()):
        raise ValueError(f"{field_name} is {activation!r}, which has weights: not supported")


def _all_activations() -> Any:
    from transformers.activations import ACT2FN  # see the docstring of this file

    return ACT2FN
