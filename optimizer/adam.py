"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), which updates many weights in one call."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)
EPS = 1e-6

State = dict[str, Tensor]  # of one weight


class Algorithm(Protocol):
    """An optimizer of weights on one device; `kind` is its name in checkpoints."""

    @property
    def kind(self) -> str: ...

    def empty_state(self, weight: Tensor) -> State:
        """Returns the state of a weight before its first update."""

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
        """Updates `weights` and `states` in place with the gradients times `factor`.

        The host does not wait for a GPU.

        Args:
            weights: at least one weight, in fp32.
            gradients: the gradient of each weight; they are overwritten.
            states: the state of each weight.
            factor: the factor of the gradients, above 0.
            lr: the learning rate.
            weight_decay: the weight decay of all these weights.
            update: the number of earlier updates.
        """


class Adam:
    """torch's fused AdamW, with fp32 moments; an update reads and writes each tensor only once."""

    kind = "adam"

    def empty_state(self, weight: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

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
        device = weights[0].device
        # torch.full computes on the device; torch.tensor would copy from the host and wait.
        updates = torch.full((len(weights),), float(update), device=device)
        # The kernel divides by grad_scale. torch.full rejects numbers that fp32 cannot hold.
        divisor = min(1.0 / factor, torch.finfo(torch.float32).max)
        adamw(
            list(weights),
            list(gradients),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(updates.unbind()),  # the kernel adds 1 to each
            fused=True,
            grad_scale=torch.full((), divisor, device=device),
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=EPS,
            maximize=False,
        )
