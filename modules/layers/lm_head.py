"""A model's head, and its loss over a vocabulary so large that the logits are the largest tensor.

The loss goes through the tokens in chunks and makes the gradients on the way, in place of the
logits: none of them outlives its chunk, and there is never a second copy of their size. (As in
Hsu et al., Liger Kernel, arXiv 2410.10989.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modules.layers.linear import Linear
from modules.matmul.rounding import linear, matmul

IGNORED = -100  # the label of a token that is not trained
CHUNK_BYTES = 64 * 2**20  # of a chunk's logits in fp32: large enough for fast products


class Head(nn.Module):
    """A final norm and a projection onto the vocabulary; a family names the two."""

    @property
    def norm(self) -> nn.LayerNorm:
        raise NotImplementedError

    @property
    def projection(self) -> Linear:
        raise NotImplementedError

    def forward(self, x: Tensor, keys: object = None, documents: object = None) -> Tensor:
        """(rows, tokens, hidden) to logits (rows, tokens, vocabulary)."""
        logits: Tensor = self.projection(self.norm(x))
        return logits

    def loss(self, x: Tensor, labels: Tensor, *, scale: float) -> Tensor:
        """The sum of the cross entropies, in fp32, of x (rows, tokens, hidden) against labels
        (rows, tokens), where labels are not IGNORED.

        Its backward gives the gradient of x for the loss times `scale`, whatever it is given; the
        projection's has gone to its sink by then.
        """
        normed, wanted = self.norm(x).flatten(0, 1), labels.flatten()
        if torch.is_grad_enabled():
            loss: Tensor = _Loss.apply(normed, wanted, self.projection, scale)  # type: ignore[no-untyped-call]
            return loss
        return _loss_alone(normed, wanted, self.projection)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, projection: Linear, scale: float) -> Tensor:
        back = torch.empty_like(x)
        rows = _rows(projection)
        chunks = list(zip(x.split(rows), labels.split(rows), back.split(rows), strict=True))
        losses = [
            _train_(*chunk, projection, scale=scale, last=index + 1 == len(chunks))
            for index, chunk in enumerate(chunks)
        ]
        ctx.save_for_backward(back)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return *ctx.saved_tensors, None, None, None


def _train_(
    x: Tensor, labels: Tensor, back: Tensor, projection: Linear, *, scale: float, last: bool
) -> Tensor:
    """The loss of one chunk, whose gradients go to `back` and to the projection's sink.

    A function of its own, so that its logits are gone before the next chunk's are made.
    """
    assert projection.grad_buffer is not None, "training hands over its gradients"
    logits = linear(x, projection.weight, projection.bias).float()
    loss = token_losses_(logits, labels)
    gradient = _gradients_(logits, labels, scale).to(x.dtype)
    del logits
    back.copy_(matmul(gradient, projection.weight))
    projection.grad_buffer.add_linear(projection.weight, projection.bias, gradient, x, last=last)
    return loss


def token_losses_(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses of `logits` (tokens, vocabulary), which become log-probabilities."""
    torch.log_softmax(logits, 1, out=logits)
    chosen = logits.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    return -torch.where(labels == IGNORED, 0.0, chosen).sum()


def _gradients_(log_probabilities: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The gradients of the loss times `scale` by the logits, in place of the log-probabilities."""
    trained = labels != IGNORED
    gradient = log_probabilities.exp_()
    index = labels.clamp_min(0).unsqueeze(1)
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    return gradient.mul_((trained * scale).unsqueeze(1))


def _loss_alone(x: Tensor, labels: Tensor, projection: Linear) -> Tensor:
    rows = _rows(projection)
    losses = [
        token_losses_(linear(part, projection.weight, projection.bias).float(), wanted)
        for part, wanted in zip(x.split(rows), labels.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()


def _rows(projection: Linear) -> int:
    """Tokens of a chunk."""
    return max(1, CHUNK_BYTES // (4 * projection.out_features))
