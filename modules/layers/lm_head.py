"""The head of a model; its loss is computed in chunks, so that the logits need little memory.

With a large vocabulary the logits are the largest tensor. The loss processes the tokens in chunks
and overwrites the logits with their gradients. So only the logits of one chunk are in memory, and
there is no second tensor of this size. (As in Hsu et al., Liger Kernel, arXiv 2410.10989.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from modules.layers.linear import Linear
from modules.matmul.rounding import linear, matmul

IGNORED = -100  # the label of a token that is not trained


class Head(nn.Module):
    """A final norm and a projection onto the vocabulary; each family names these two modules."""

    norm_name: str
    projection_name: str

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = getattr(self, self.norm_name)
        return norm

    @property
    def projection(self) -> Linear:
        projection: Linear = getattr(self, self.projection_name)
        return projection

    def forward(self, x: Tensor, keys: object = None, documents: object = None) -> Tensor:
        """Returns logits (rows, seq_len, vocabulary) of activations (rows, seq_len, hidden)."""
        logits: Tensor = self.projection(self.final_norm(x))
        return logits

    def loss(self, x: Tensor, labels: Tensor, *, scale: float) -> Tensor:
        """Returns the sum of the cross entropies, in fp32.

        Backward returns the gradient of the loss times `scale`; it ignores the gradient that it
        receives. Forward already adds the projection's gradient to the gradient buffer.

        Args:
            x: activations (rows, seq_len, hidden).
            labels: (rows, seq_len); tokens with the label IGNORED add nothing to the loss.
            scale: the factor of the gradients; the returned loss is not scaled.
        """
        normed, flat_labels = self.final_norm(x).flatten(0, 1), labels.flatten()
        if torch.is_grad_enabled():
            loss: Tensor = _Loss.apply(normed, flat_labels, self.projection, scale)  # type: ignore[no-untyped-call]
            return loss
        return _loss_only(normed, flat_labels, self.projection)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, projection: Linear, scale: float) -> Tensor:
        d_x = torch.empty_like(x)
        rows = _chunk_rows(projection)
        chunks = list(zip(x.split(rows), labels.split(rows), d_x.split(rows), strict=True))
        losses = [
            _train_(*chunk, projection, scale=scale, last=index + 1 == len(chunks))
            for index, chunk in enumerate(chunks)
        ]
        ctx.save_for_backward(d_x)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return *ctx.saved_tensors, None, None, None


def _train_(
    x: Tensor, labels: Tensor, d_x: Tensor, projection: Linear, *, scale: float, last: bool
) -> Tensor:
    """Returns the loss of one chunk; writes the gradients to `d_x` and to the gradient buffer.

    The logits of this chunk are freed before the logits of the next chunk are created.
    """
    assert projection.grad_buffer is not None, "training needs a gradient buffer"
    logits = linear(x, projection.weight, projection.bias).float()
    loss = token_losses_(logits, labels)
    gradient = _gradients_(logits, labels, scale).to(x.dtype)
    del logits
    d_x.copy_(matmul(gradient, projection.weight))
    projection.grad_buffer.add_linear(projection.weight, projection.bias, gradient, x, last=last)
    return loss


def token_losses_(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum of the losses of `logits` (tokens, vocabulary).

    The logits become log-probabilities in place.
    """
    torch.log_softmax(logits, 1, out=logits)
    label_logits = logits.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    return -torch.where(labels == IGNORED, 0.0, label_logits).sum()


def _gradients_(log_probabilities: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Replaces log-probabilities by the gradient of (loss * scale) with respect to the logits."""
    trained = labels != IGNORED
    gradient = log_probabilities.exp_()
    index = labels.clamp_min(0).unsqueeze(1)
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    return gradient.mul_((trained * scale).unsqueeze(1))


def _loss_only(x: Tensor, labels: Tensor, projection: Linear) -> Tensor:
    """Returns the sum of the losses, computed chunk by chunk without gradients."""
    rows = _chunk_rows(projection)
    losses = [
        token_losses_(linear(part, projection.weight, projection.bias).float(), part_labels)
        for part, part_labels in zip(x.split(rows), labels.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_rows(projection: Linear) -> int:
    """Returns the number of tokens in a chunk."""
    return max(1, chunk_bytes(projection.weight.device.type) // (4 * projection.out_features))


def chunk_bytes(device_type: str) -> int:
    """Returns the size of a chunk's logits in fp32, large enough for fast matmuls.

    With a vocabulary of 50304, these are 333 tokens on a CPU and 2668 on a GPU, which is fast only
    with larger matrices. "meta" stands for a GPU in a dry run.
    """
    return (64 if device_type == "cpu" else 512) * 2**20
