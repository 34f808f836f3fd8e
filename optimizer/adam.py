"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), which updates one weight at a time."""

from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)
EPS = 1e-6

State = dict[str, Tensor]  # of one weight


class Algorithm(Protocol):
    """An optimizer that updates one weight at a time; `kind` is its name in checkpoints."""

    @property
    def kind(self) -> str: ...

    def empty_state(self, weight: Tensor) -> State:
        """Returns the state of a weight before its first update."""

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
        """Updates `weight` and `state` in place; `update` is the number of earlier updates."""


class Adam:
    """torch's fused AdamW, with fp32 moments; an update reads and writes each tensor only once."""

    kind = "adam"

    def empty_state(self, weight: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

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
        adamw(
            [weight],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [torch.tensor(float(update), device=weight.device)],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=EPS,
            maximize=False,
        )
