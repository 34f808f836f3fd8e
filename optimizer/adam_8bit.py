"""AdamW with moments in 8 bits, from bitsandbytes (Dettmers et al., arXiv 2110.02861)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from optimizer.adam import BETAS, EPS


class Adam8bit:
    """bitsandbytes' AdamW8bit, one weight at a time.

    Weights of fewer than 4096 numbers keep fp32 moments, as bitsandbytes has it. ValueError where
    bitsandbytes is not installed.
    """

    kind = "8bit-adam"

    def __init__(self) -> None:
        try:
            from bitsandbytes import optim
        except ImportError as error:
            raise ValueError(
                f"--optimizer 8bit-adam: {error}; install it with `pip install bitsandbytes`"
            ) from None
        self._make: Any = optim.AdamW8bit

    def empty_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state of a weight before its first update: codes, their tables and block maxima."""
        parameter = nn.Parameter(weight, requires_grad=False)
        adam = self._make([parameter], betas=BETAS, eps=EPS)
        adam.init_state(adam.param_groups[0], parameter, 0, 0)
        state = adam.state[parameter]
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def step(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        *,
        lr: float,
        weight_decay: float,
        update: int,
    ) -> None:
        """Steps `weight` and `state` in place; `update` counts the updates before this one."""
        parameter = nn.Parameter(weight)
        parameter.grad = gradient
        adam = self._make([parameter], lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
        adam.state[parameter] = {**state, "step": update}
        adam.step()
