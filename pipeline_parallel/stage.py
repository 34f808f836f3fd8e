"""How a stage runs one microbatch forward and backward, and what it keeps in between."""

from typing import NamedTuple

import torch
from torch import Tensor

from modules.attention.packed_documents import PackedDocuments
from modules.layers.dropout import Keys
from modules.layers.linear import Deferred, WeightGradBuffer, attach_grad_buffer
from modules.stage_model import StageModel


class _InFlight(NamedTuple):
    """A microbatch between forward and backward: the stage's input and output."""

    x: Tensor
    out: Tensor


class Stage:
    """Forward and backward of one stage; first, middle and last stages are this one class.

    Args:
        model: the stage's part of the model.
        recompute: backward computes the activations again.
        gradients: the buffer to which backward adds the gradients of large weights.
        splits: backward comes in two parts, `backward` and `weight_gradient`.
    """

    def __init__(
        self, model: StageModel, *, recompute: bool, gradients: WeightGradBuffer, splits: bool
    ) -> None:
        self._model, self._recompute, self._splits = model, recompute, splits
        self._gradients = gradients
        self._after_forward: dict[int, _InFlight] = {}
        self._deferred: dict[int, Deferred] = {}
        attach_grad_buffer(model, gradients)

    @property
    def in_flight(self) -> set[int]:
        """The microbatches between forward and the end of backward."""
        return self._after_forward.keys() | self._deferred.keys()

    def forward(
        self,
        microbatch: int,
        x: Tensor,
        labels: Tensor | None,
        keys: Keys,
        *,
        loss_scale: float,
        documents: PackedDocuments | None = None,
    ) -> Tensor:
        """Runs a microbatch forward and keeps what its backward needs.

        Args:
            microbatch: its number.
            x: token ids (rows, seq_len), or the activations of the stage before.
            labels: (rows, seq_len), on a last stage.
            keys: the dropout keys of the rows.
            loss_scale: the factor of the loss in backward.
            documents: those of the rows, where they are kept apart.

        Returns:
            The activations for the next stage or, given labels, the sum of the token losses.
        """
        if x.is_floating_point():
            x.requires_grad_()
        with self._gradients.deferring(self._deferred_of(microbatch)):
            if labels is None:
                out: Tensor = self._model(x, keys, documents=documents, recompute=self._recompute)
            else:
                out = self._model.loss(
                    x,
                    labels,
                    keys,
                    scale=loss_scale,
                    documents=documents,
                    recompute=self._recompute,
                )
        self._after_forward[microbatch] = _InFlight(x, out)
        return out.detach()

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        """Adds to the gradients of the weights; returns that of the stage's input, if it has one.

        `gradient` is that of the output, or None where the output was a loss. Where backward is
        split, the gradients of large weights follow in `weight_gradient`.
        """
        x, out = self._after_forward.pop(microbatch)
        with self._gradients.deferring(self._deferred_of(microbatch)):
            torch.autograd.backward(out, gradient)
        return x.grad

    def weight_gradient(self, microbatch: int) -> None:
        """Adds to the gradients of large weights: the second part of a backward that is split."""
        for add in self._deferred.pop(microbatch):
            add()

    @torch.no_grad()
    def evaluate(
        self, x: Tensor, labels: Tensor | None, *, documents: PackedDocuments | None = None
    ) -> Tensor:
        """Returns what `forward` returns, without dropout, and keeps nothing."""
        if labels is None:
            out: Tensor = self._model(x, None, documents=documents)
            return out
        return self._model.loss(x, labels, None, scale=1.0, documents=documents)

    def _deferred_of(self, microbatch: int) -> Deferred | None:
        """Returns the deferred additions of a microbatch; None where backward is not split."""
        return self._deferred.setdefault(microbatch, []) if self._splits else None
