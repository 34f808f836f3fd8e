"""Layers with large weights, whose gradients go straight into the buffer that holds them all.

Autograd would make each weight's gradient anew for every microbatch and then add it. Given a
`GradientSink`, these layers hand it the two factors of that gradient instead: it adds their product
in place, now or, where a schedule puts weight gradients off (zb-h1), later. Without one they are
torch's own layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modules.matmul.rounding import linear, matmul

Deferred = list[Callable[[], None]]


class GradientSink(Protocol):
    """Takes what makes up the gradients of weights."""

    def add_product(
        self, weight: Tensor, bias: Tensor | None, gradient: Tensor, x: Tensor, *, last: bool
    ) -> None:
        """`gradient` (rows, outputs) and `x` (rows, inputs) of a linear layer.

        `last`: nothing more comes for this weight from this microbatch.
        """

    def add_rows(self, weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """`gradient` (n, hidden) belongs to the weight's rows number `rows` (n)."""

    def deferring(self, deferred: Deferred | None) -> AbstractContextManager[None]:
        """Products handed over meanwhile are put off: `deferred` gets a call for each.

        None: nothing is put off.
        """


class Linear(nn.Linear):
    """torch's Linear, with `sink` for its gradients."""

    sink: GradientSink | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.sink is None or not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        out: Tensor = _Linear.apply(x, self.weight, self.bias, self.sink)  # type: ignore[no-untyped-call]
        return out


class Lookup(nn.Embedding):
    """torch's Embedding, with `sink` for its gradients."""

    sink: GradientSink | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.sink is None or not torch.is_grad_enabled():
            return super().forward(tokens)
        out: Tensor = _Rows.apply(tokens, self.weight, self.sink)  # type: ignore[no-untyped-call]
        return out


def attach_sink(model: nn.Module, sink: GradientSink) -> None:
    """Lets all layers of `model` that can hand their gradients to `sink`."""
    for module in model.modules():
        if isinstance(module, (Linear, Lookup)):
            module.sink = sink


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: GradientSink
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.sink = weight, bias, sink  # the very parameters
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        flat = gradient.reshape(-1, weight.shape[0])
        back = matmul(flat, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        ctx.sink.add_product(weight, bias, flat, x.reshape(-1, weight.shape[1]), last=True)
        return back, None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, sink: GradientSink) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.sink = weight, sink
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        ctx.sink.add_rows(weight, tokens.flatten(), gradient.reshape(-1, weight.shape[1]))
        return None, None, None
