"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), one weight at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)
EPS = 1e-6


class Adam:
    """torch's fused AdamW, which passes over memory once, with moments in fp32."""

    kind = "adam"

    def empty_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state of a weight before its first update: both moments, shaped like it."""
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def step(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        *,
        factor: float,
        lr: float,
        weight_decay: float,
        update: int,
    ) -> None:
        """Steps `weight` and `state` in place by `gradient` times `factor`; `update` counts the
        updates before this one. The gradient may be overwritten."""
        adamw(
            [weight],
            [gradient.mul_(factor)],
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
