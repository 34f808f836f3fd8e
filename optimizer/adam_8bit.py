"""AdamW with moments in 8 bits, from bitsandbytes (Dettmers et al., arXiv 2110.02861)."""

from typing import Any

import torch
from torch import Tensor, nn

from optimizer.adam import BETAS, EPS, State


class Adam8bit:
    """bitsandbytes' AdamW8bit, one weight at a time.

    One bitsandbytes optimizer steps every weight, which is put into it with its state: making an
    optimizer takes longer than its step. Weights of fewer than 4096 numbers keep fp32 moments, as
    bitsandbytes has it.

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
        """Returns codes, their tables and block maxima."""
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
        """Returns the state of a parameter, and drops every reference to it."""
        self._adam.param_groups[0]["params"] = []
        state: dict[str, Any] = self._adam.state.pop(parameter)
        return state
