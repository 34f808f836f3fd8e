"""How a stage runs one microbatch forward and backward, and what it keeps in between."""

import torch
from torch import Tensor

from modules.attention.packed_documents import PackedDocuments
from modules.layers.dropout import Keys
from modules.layers.linear import Deferred, WeightGradBuffer, attach_grad_buffer
from modules.stage_model import StageModel


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
        self._after_forward: dict[int, tuple[Tensor, Tensor]] = {}  # a stage's input and output
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
            out = self._output(x, labels, keys, documents, scale=loss_scale)
        self._after_forward[microbatch] = x, out
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
        return self._output(x, labels, None, documents, scale=1.0)

    def _output(
        self,
        x: Tensor,
        labels: Tensor | None,
        keys: Keys,
        documents: PackedDocuments | None,
        *,
        scale: float,
    ) -> Tensor:
        model, recompute = self._model, self._recompute
        if labels is not None:
            return model.loss(
                x, labels, keys, scale=scale, documents=documents, recompute=recompute
            )
        activations: Tensor = model(x, keys, documents=documents, recompute=recompute)
        return activations

    def _deferred_of(self, microbatch: int) -> Deferred | None:
        """Returns the deferred additions of a microbatch; None where backward is not split."""
        return self._deferred.setdefault(microbatch, []) if self._splits else None
