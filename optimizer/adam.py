"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) over the parameters of one stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPS = 1e-6
MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam:
    """torch's AdamW with decay on matrices alone: no bias, no norm.

    Its state is kept by parameter name, so that a checkpoint does not hang on an order.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float) -> None:
        self._parameters = dict(parameters)
        matrices = [p for p in self._parameters.values() if p.dim() >= 2]
        others = [p for p in self._parameters.values() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=BETAS, eps=EPS
        )
        self._fill(updates=0)

    def step(self, lr: float) -> None:
        """One update from the parameters' `.grad`."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """The moments by parameter name, and the number of updates made."""
        kept: dict[str, Any] = {
            moment: {name: self._state(p)[moment] for name, p in self._parameters.items()}
            for moment in MOMENTS
        }
        return {"kind": "adam", "updates": self.updates, **kept}

    def tensors(self) -> list[Tensor]:
        """The moments themselves, in a fixed order."""
        return [self._state(p)[moment] for p in self._parameters.values() for moment in MOMENTS]

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores `state()`; ValueError names what is missing, extra or misshapen."""
        for moment in MOMENTS:
            found = state.get(moment)
            if not isinstance(found, Mapping) or found.keys() != self._parameters.keys():
                different = set(found or ()) ^ self._parameters.keys()
                raise ValueError(f"optimizer state {moment}: keys differ: {sorted(different)[:3]}")
            for name, parameter in self._parameters.items():
                if found[name].shape != parameter.shape:
                    raise ValueError(
                        f"optimizer state {moment}.{name} is {tuple(found[name].shape)}, "
                        f"expected {tuple(parameter.shape)}"
                    )
                self._state(parameter)[moment].copy_(found[name])
        self.set_updates(int(state["updates"]))

    def set_updates(self, updates: int) -> None:
        """Sets how many updates have been made, which the bias correction depends on."""
        self.updates = updates
        for parameter in self._parameters.values():
            self._state(parameter)["step"].fill_(updates)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._adam.state[parameter]
        return state

    def _fill(self, *, updates: int) -> None:
        self.updates = updates
        for parameter in self._parameters.values():
            self._adam.state[parameter] = {
                "step": torch.tensor(float(updates)),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
