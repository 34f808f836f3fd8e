"""The update step: it clips the gradients and changes the weights, or skips the update.

All processes of a run make the same decision whether to skip the update.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizer.loss_scaler import LossScaler
from optimizer.mixed_precision import MixedPrecisionOptimizer


class UpdateResult(NamedTuple):
    """The learning rate of an update, its gradient norm before clipping, and its loss scale.

    grad_norm: None if the update was skipped.
    """

    lr: float
    grad_norm: float | None
    loss_scale: float


class UpdateStep:
    """The update step: it unscales and clips the gradients, and updates the weights.

    Backward divides the token losses by a fixed number, `nominal_tokens`. The update step corrects
    the gradients for the exact number of trained tokens.

    Args:
        optimizer: updates the weights.
        scaler: the loss scale.
        schedule: returns the learning rate of the update with a given number, counted from 0.
        nominal_tokens: the divisor of the token losses in backward.
        max_grad_norm: the limit of the gradient norm.
        max_skipped: the number of skipped updates in a row after which the run ends.
    """

    def __init__(
        self,
        optimizer: MixedPrecisionOptimizer,
        scaler: LossScaler,
        *,
        schedule: Callable[[int], float],
        nominal_tokens: int,
        max_grad_norm: float,
        max_skipped: int,
    ) -> None:
        self.optimizer, self._scaler, self._schedule = optimizer, scaler, schedule
        self._nominal, self._max_grad_norm = nominal_tokens, max_grad_norm
        self._max_skipped = max_skipped
        self.skipped_in_a_row = 0

    @property
    def loss_scale(self) -> float:
        """Returns `scale` / `nominal_tokens`; backward multiplies the sum of token losses by it."""
        return self._scaler.scale / self._nominal

    @property
    def scale(self) -> float:
        """Returns the loss scale, without the division by `nominal_tokens`."""
        return self._scaler.scale

    @property
    def may_skip(self) -> bool:
        """Returns whether gradients that are not finite skip the update rather than end the run."""
        return self._scaler.may_skip

    @property
    def has_given_up(self) -> bool:
        """Returns whether `max_skipped` updates in a row have been skipped."""
        return self.skipped_in_a_row >= self._max_skipped

    def apply(
        self, squared_norm: float, *, num_trained_tokens: int, losses_are_finite: bool
    ) -> UpdateResult:
        """Updates the weights with the gradients summed over the replicas, or skips the update.

        The update is skipped if the gradients or the losses are not finite. The losses are checked
        too, because a logit of -inf makes an infinite loss with finite gradients.

        Args:
            squared_norm: the squared norm of the gradients of all stages.
            num_trained_tokens: the number of trained tokens in all microbatches of all replicas.
            losses_are_finite: whether the losses of all these microbatches are finite.
        """
        scale, lr = self._scaler.scale, self._schedule(self.optimizer.updates)
        overflow = not (losses_are_finite and math.isfinite(squared_norm))
        self._scaler.update(overflow=overflow)
        if overflow:
            self.optimizer.gradients.buffer.zero_()
            self.skipped_in_a_row += 1
            return UpdateResult(lr, None, scale)
        correction = self._nominal / num_trained_tokens / scale
        norm = math.sqrt(squared_norm) * correction
        factor = correction * clip_factor(norm, self._max_grad_norm)
        self.optimizer.step(lr=lr, factor=factor)
        self.skipped_in_a_row = 0
        return UpdateResult(lr, norm, scale)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: the number of skips in a row and the scaler's state."""
        return {"skipped_in_a_row": self.skipped_in_a_row, "scaler": self._scaler.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a saved state; counts skips from 0 if the saved number would end the run."""
        skipped = int(state["skipped_in_a_row"])
        self.skipped_in_a_row = skipped if skipped < self._max_skipped else 0
        self._scaler.load_state(state["scaler"])


def squared_norms(gradients: Sequence[Tensor]) -> list[float]:
    """Returns for each gradient the sum of its squares, computed from its norm in fp32.

    The host waits for a GPU once, because it needs the values.
    """
    if not gradients:
        return []
    norms = torch.stack(torch._foreach_norm(list(gradients), dtype=torch.float32))
    values: list[float] = norms.double().square().tolist()
    return values


def clip_factor(norm: float, max_norm: float) -> float:
    """Returns the factor that clips gradients of norm `norm`, as torch's clip_grad_norm_ does."""
    if math.isinf(max_norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
