"""How a stage runs one microbatch forward and backward, and what it keeps in between."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modules.attention.packed_documents import PackedDocuments
from modules.layers.dropout import Keys
from modules.layers.linear import Deferred, WeightGradBuffer, attach_grad_buffer
from modules.stage_model import StageModel


class _Live(NamedTuple):
    """A microbatch between forward and backward: the stage's input and output."""

    x: Tensor
    out: Tensor


class Stage:
    """Forward and backward of one stage; first, middle and last stages are this one class.

    gradients: where the gradients of large weights go.
    splits: backward comes in two parts, `input_gradient` and `weight_gradient`.
    """

    def __init__(
        self, model: StageModel, *, recompute: bool, gradients: WeightGradBuffer, splits: bool
    ) -> None:
        self._model, self._recompute, self._splits = model, recompute, splits
        self._gradients = gradients
        self._live: dict[int, _Live] = {}
        self._deferred: dict[int, Deferred] = {}
        attach_grad_buffer(model, gradients)

    @property
    def held(self) -> set[int]:
        """The microbatches between forward and the end of backward."""
        return self._live.keys() | self._deferred.keys()

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
        """Runs `x` (activations, or token ids) and keeps what backward needs.

        Returns activations to send on or, given `labels` (rows, tokens), the sum of token losses,
        whose gradients will be those of the sum times `loss_scale`. `documents` of the rows are
        kept apart.
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
        self._live[microbatch] = _Live(x, out)
        return out.detach()

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        """Adds to the parameters' gradients; returns that of the stage's input, if it has one.

        `gradient` is that of the output, or None where the output was a loss.
        """
        x, out = self._live.pop(microbatch)
        with self._gradients.deferring(self._deferred_of(microbatch)):
            torch.autograd.backward(out, gradient)
        return x.grad

    def weight_gradient(self, microbatch: int) -> None:
        """The second part of a backward that is split: adds the gradients of large weights."""
        for add in self._deferred.pop(microbatch):
            add()

    @torch.no_grad()
    def evaluate(
        self, x: Tensor, labels: Tensor | None, *, documents: PackedDocuments | None = None
    ) -> Tensor:
        """As `forward`, without dropout, keeping nothing."""
        if labels is None:
            out: Tensor = self._model(x, None, documents=documents)
            return out
        return self._model.loss(x, labels, None, scale=1.0, documents=documents)

    def _deferred_of(self, microbatch: int) -> Deferred | None:
        """Where a microbatch's products are put off to; None where nothing is."""
        return self._deferred.setdefault(microbatch, []) if self._splits else None
