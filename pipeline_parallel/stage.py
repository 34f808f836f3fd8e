"""How a stage runs one microbatch forward and one backward, and what it keeps in between."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from modules.dropout import Keys
from modules.stage_model import StageModel

IGNORED = -100


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross entropies, in fp32, of logits (rows, tokens, vocabulary) against labels
    (rows, tokens), where labels are not IGNORED."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


class Stage:
    """Forward and backward of one stage; first, middle and last stages are this one class."""

    def __init__(self, model: StageModel, *, recompute: bool) -> None:
        self.model = model
        self._recompute = recompute
        self._live: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, microbatch: int, x: Tensor, labels: Tensor | None, keys: Keys) -> Tensor:
        """Runs `x` (activations, or token ids) and keeps what backward needs.

        Returns activations to send on or, given `labels` (rows, tokens), the sum of token losses.
        """
        if x.is_floating_point():
            x.requires_grad_()
        out = self._run(x, labels, keys, recompute=self._recompute)
        self._live[microbatch] = (x, out)
        return out.detach()

    def backward(
        self, microbatch: int, gradient: Tensor | None, *, loss_scale: float
    ) -> Tensor | None:
        """Adds to the parameters' gradients; returns that of the stage's input, if it has one.

        `gradient` is that of the output, or None where the output was a loss, which is then
        multiplied by `loss_scale`.
        """
        x, out = self._live.pop(microbatch)
        if gradient is None:
            out = out * loss_scale
        torch.autograd.backward(out, gradient)
        return x.grad

    @torch.no_grad()
    def evaluate(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """As `forward`, without dropout, keeping nothing."""
        return self._run(x, labels, None, recompute=False)

    def _run(self, x: Tensor, labels: Tensor | None, keys: Keys, *, recompute: bool) -> Tensor:
        out: Tensor = self.model(x, keys, recompute=recompute)
        return out if labels is None else token_loss_sum(out, labels[:, :-1])
