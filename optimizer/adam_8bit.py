"""AdamW with 8-bit moments, from bitsandbytes (Dettmers et al., arXiv 2110.02861)."""

from typing import Any

import torch
from torch import Tensor, nn

from optimizer.adam import BETAS, EPS, State


class Adam8bit:
    """AdamW8bit of bitsandbytes, which updates one weight at a time.

    All updates use one optimizer object of bitsandbytes, because making a new object takes longer
    than an update. Before an update, the weight and its state are put into this object; after
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
        self._put_in(parameter, {})
        self._adam.init_state(self._adam.param_groups[0], parameter, 0, 0)
        state = self._take_out(parameter)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def step(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: State,
        *,
        lr: float,
        weight_decay: float,
        update: int,
    ) -> None:
        parameter = nn.Parameter(weight)
        parameter.grad = gradient
        self._put_in(parameter, {**state, "step": update}, lr=lr, weight_decay=weight_decay)
        self._adam.step()
        self._take_out(parameter)

    def _put_in(self, parameter: nn.Parameter, state: dict[str, Any], **options: float) -> None:
        self._adam.param_groups[0].update(params=[parameter], **options)
        self._adam.state[parameter] = state

    def _take_out(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Removes a parameter from the optimizer of bitsandbytes; returns the parameter's state."""
        self._adam.param_groups[0]["params"] = []
        state: dict[str, Any] = self._adam.state.pop(parameter)
        return state
