"""Forward and backward of a microbatch on a stage, and the tensors kept between these two."""

import torch
from torch import Tensor

from modules.attention.packed_documents import PackedDocuments
from modules.layers.dropout import Keys
from modules.layers.linear import Deferred, WeightGradBuffer, attach_grad_buffer
from modules.layers.selective import Recompute
from modules.stage_model import StageModel


class Stage:
    """Forward and backward of a stage; first, middle and last stages use the same class.

    Args:
        model: the stage's part of the model.
        recompute: which activations backward computes again.
        gradients: the buffer to which linear layers and the embedding add their gradients.
        splits: whether a backward pass is two calls: `backward`, and later `weight_gradient`.
    """

    def __init__(
        self,
        model: StageModel,
        *,
        recompute: Recompute,
        gradients: WeightGradBuffer,
        splits: bool,
    ) -> None:
        self._model, self._recompute, self._splits = model, recompute, splits
        self._gradients = gradients
        self._after_forward: dict[int, tuple[Tensor, Tensor]] = {}  # the stage's input and output
        self._deferred: dict[int, Deferred] = {}
        attach_grad_buffer(model, gradients)

    @property
    def in_flight(self) -> set[int]:
        """Returns the microbatches whose forward has run and whose backward is not complete."""
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
        """Runs forward of a microbatch, and keeps the tensors that backward needs.

        Args:
            microbatch: the number of the microbatch.
            x: token ids (rows, seq_len), or the activations of the previous stage.
            labels: (rows, seq_len) on the last stage; None on other stages.
            keys: a dropout key for each row; None for no dropout.
            loss_scale: the factor of the loss in backward.
            documents: the documents of the rows; None if attention crosses documents.

        Returns:
            The activations for the next stage; on the last stage, the sum of the token losses.
        """
        if x.is_floating_point():
            x.requires_grad_()
        with self._gradients.deferring(self._deferred_of(microbatch)):
            out = self._output(x, labels, keys, documents, scale=loss_scale)
        self._after_forward[microbatch] = x, out
        return out.detach()

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        """Adds the gradients of the weights to the buffer; returns the gradient of the input.

        Returns None on the first stage, because token ids have no gradient. `gradient` is the
        gradient of the stage's output, or None if the output is a loss. If backward is split, the
        gradients of linear layers are not added here but in `weight_gradient`.
        """
        x, out = self._after_forward.pop(microbatch)
        # By default autograd runs a GPU's backward in another thread. Two threads that launch
        # kernels wait for each other at CUDA's lock, and each has a cuBLAS handle and workspace of
        # its own. With one thread, the launches have the order of this program.
        with (
            torch.autograd.set_multithreading_enabled(False),
            self._gradients.deferring(self._deferred_of(microbatch)),
        ):
            torch.autograd.backward(out, gradient)
        return x.grad

    def weight_gradient(self, microbatch: int) -> None:
        """Runs the second part of a split backward: adds the gradients of linear layers."""
        for add in self._deferred.pop(microbatch):
            add()

    @torch.no_grad()
    def evaluate(
        self, x: Tensor, labels: Tensor | None, *, documents: PackedDocuments | None = None
    ) -> Tensor:
        """Returns the result of `forward` without dropout; keeps no tensors for backward."""
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
        """Returns a microbatch's list of deferred additions; None if backward is not split."""
        return self._deferred.setdefault(microbatch, []) if self._splits else None
