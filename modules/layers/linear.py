"""Layers with large weights, whose gradients are added directly into the gradient buffer.

For every microbatch, autograd would create each weight's gradient as a new tensor and then add this
tensor to the sum. With a `WeightGradBuffer`, these layers give the buffer the two factors of the
gradient, and the buffer adds the product of both factors in place. A schedule that defers weight
gradients (zb-h1) adds the product later. Without a buffer, these layers are torch's own layers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modules.matmul.rounding import linear, matmul

Deferred = list[Callable[[], None]]


class WeightGradBuffer(Protocol):
    """The gradient buffer's interface for layers; `data_parallel.grad_buffer` implements it."""

    def add_linear(
        self, weight: Tensor, bias: Tensor | None, gradient: Tensor, x: Tensor, *, last: bool
    ) -> None:
        """Adds the gradients of a linear layer's weight and bias.

        Args:
            gradient: (tokens, outputs), the gradient of the layer's output.
            x: (tokens, inputs), the layer's input.
            last: whether this is the microbatch's last addition to this weight's gradient.
        """

    def add_rows(self, weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Adds each row i of `gradient` (n, hidden) to row `rows[i]` of the weight's gradient."""

    def deferring(self, deferred: Deferred | None) -> AbstractContextManager[None]:
        """Defers additions to gradients in the `with` block.

        Each addition is appended to `deferred` as a function to call later. If `deferred` is None,
        additions are not deferred.
        """


class Linear(nn.Linear):
    """torch's Linear, with an optional gradient buffer."""

    grad_buffer: WeightGradBuffer | None = None

    def reset_parameters(self) -> None:
        """Initialises the weights, except on the device "meta".

        On "meta" an initialisation has no effect, but makes torch import torch.compile, which takes
        1.3 s.
        """
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_buffer is None or not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        out: Tensor = _Linear.apply(x, self.weight, self.bias, self.grad_buffer)  # type: ignore[no-untyped-call]
        return out


class Embedding(nn.Embedding):
    """torch's Embedding, with an optional gradient buffer."""

    grad_buffer: WeightGradBuffer | None = None

    def reset_parameters(self) -> None:
        """Initialises the weights, except on the device "meta", like `Linear`."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.grad_buffer is None or not torch.is_grad_enabled():
            return super().forward(token_ids)
        out: Tensor = _Rows.apply(token_ids, self.weight, self.grad_buffer)  # type: ignore[no-untyped-call]
        return out


def attach_grad_buffer(model: nn.Module, grad_buffer: WeightGradBuffer) -> None:
    """Sets `grad_buffer` in all layers of `model` that can use a gradient buffer."""
    for module in model.modules():
        if isinstance(module, (Linear, Embedding)):
            module.grad_buffer = grad_buffer


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, grad_buffer: WeightGradBuffer
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias  # the parameters themselves, not views
        ctx.grad_buffer = grad_buffer
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        flat = gradient.reshape(-1, weight.shape[0])
        d_x = matmul(flat, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        ctx.grad_buffer.add_linear(weight, bias, flat, x.reshape(-1, weight.shape[1]), last=True)
        return d_x, None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token_ids: Tensor, weight: Tensor, grad_buffer: WeightGradBuffer
    ) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.weight, ctx.grad_buffer = weight, grad_buffer
        return nn.functional.embedding(token_ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (token_ids,), weight = ctx.saved_tensors, ctx.weight
        flat = gradient.reshape(-1, weight.shape[1])
        ctx.grad_buffer.add_rows(weight, token_ids.flatten(), flat)
        return None, None, None
