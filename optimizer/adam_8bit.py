"""AdamW with 8-bit moments, from bitsandbytes (Dettmers et al., arXiv 2110.02861)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.adam import BETAS, EPS, State


class Adam8bit:
    """AdamW8bit of bitsandbytes.

    All updates use one optimizer object of bitsandbytes, because making a new object takes longer
    than an update. Before an update, the weights and their states are put into this object; after
    the update, they are taken out. bitsandbytes keeps fp32 moments for weights with fewer than 4096
    elements.

    Raises:
        ValueError: bitsandbytes is not installed.
    """

    kind = "8bit-adam"

    def __init__(self) -> None:
        try:
            from bitsandbytes import optim
        except ImportError as error:
            raise ValueError(
                f"--optimizer 8bit-adam: {error}; install it with `pip install bitsandbytes`"
            ) from None
        self._adam: Any = optim.AdamW8bit([nn.Parameter(torch.empty(0))], betas=BETAS, eps=EPS)

    def empty_state(self, weight: Tensor) -> State:
        """Returns a weight's initial state: 8-bit moments, and tables and scales to decode them."""
        parameter = nn.Parameter(weight, requires_grad=False)
        with self._holding({parameter: {}}) as group:
            self._adam.init_state(group, parameter, 0, 0)
            state = self._adam.state[parameter]
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[State],
        *,
        factor: float,
        lr: float,
        weight_decay: float,
        update: int,
    ) -> None:
        """Updates the weights; see `optimizer.adam.Algorithm.step`.

        bitsandbytes' own `step` waits for the GPU after each weight, which only its paged memory
        needs. So this method calls `update_step`, the part of `step` that updates one weight.
        """
        torch._foreach_mul_(list(gradients), factor)
        parameters = [nn.Parameter(weight) for weight in weights]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        held = zip(parameters, ({**state, "step": update} for state in states), strict=True)
        with self._holding(dict(held), lr=lr, weight_decay=weight_decay) as group:
            for index, parameter in enumerate(parameters):
                self._adam.update_step(group, parameter, 0, index)

    @contextmanager
    def _holding(
        self, states: Mapping[nn.Parameter, dict[str, Any]], **options: float
    ) -> Iterator[dict[str, Any]]:
        """Puts parameters into the optimizer of bitsandbytes in the `with` block.

        Yields the group of the parameters; `options` are the group's options.
        """
        group: dict[str, Any] = self._adam.param_groups[0]
        group.update(params=list(states), **options)
        self._adam.state.update(states)
        try:
            yield group
        finally:
            group["params"] = []
            self._adam.state.clear()
