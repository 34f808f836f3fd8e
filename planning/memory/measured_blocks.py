"""The memory of equal blocks in a dry run: one block is measured, and its equals repeat the bytes.

A fake operator costs nearly as much time as a real one on small tensors, and equal blocks need
equal bytes. So only the first of several equal blocks runs. Each of the others allocates and frees
tensors of the measured sizes: one of the size of the peak, one for the bytes that stay until
backward, and so on. The engine, the schedule and the gradient buffer are those of a real run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_parallel.grad_buffer import GradBuffer
from modules.attention.packed_documents import PackedDocuments
from modules.layers.dropout import Keys
from modules.layers.linear import Deferred
from modules.layers.selective import Recompute
from modules.stage_model import StageModel
from planning.memory.live_bytes import LiveBytes


class BlockBytes(NamedTuple):
    """The bytes of a block for one microbatch, in addition to those before the pass begins.

    Attributes:
        forward_peak: the most bytes during forward.
        saved: the bytes that stay from forward to backward, without the block's input and output.
        backward_peak: the most bytes during backward.
        deferred: the bytes that stay from a split backward to the weight gradient, without the
            gradient of the block's output.
        defers_gradient: whether this gradient stays too.
        weight_peak: the most bytes during the weight gradient of a split backward.
    """

    forward_peak: int
    saved: int
    backward_peak: int
    deferred: int
    defers_gradient: bool
    weight_peak: int


class _Measured(NamedTuple):
    """The bytes that a block repeats; `names` are its trained weights in `buffer`."""

    bytes: BlockBytes
    names: list[str]
    buffer: GradBuffer


class MeasuredStageModel(StageModel):
    """The model of a stage in a dry run; after `measure_blocks`, most blocks only repeat bytes."""

    def __init__(self, family: Any, config: Any, indices: range) -> None:
        super().__init__(family, config, indices, device="meta")
        self._measured: dict[nn.Module, _Measured] = {}

    def measure_blocks(
        self,
        buffer: GradBuffer,
        live: LiveBytes,
        x: Tensor,
        documents: PackedDocuments | None,
        *,
        recompute: Recompute,
        splits: bool,
    ) -> None:
        """Measures the first block of each kind; from now on, its equals repeat its bytes.

        Args:
            buffer: the gradient buffer; no update may have begun.
            live: counts the bytes of tensors.
            x: a tensor like the input of a block.
            documents, recompute: as in `forward`.
            splits: whether backward is split into input gradient and weight gradient.
        """
        kinds: dict[object, list[tuple[int, nn.Module]]] = {}
        for place, (index, module) in enumerate(zip(self.indices, self, strict=True)):
            if index > 0 and not (self.has_head and place == len(self) - 1):
                kinds.setdefault(_kind(module), []).append((place, module))
        keys = range(len(x))
        for (_, first), *others in kinds.values():
            run = partial(
                self.run_module, first, keys=keys, documents=documents, recompute=recompute
            )
            for place, module in others:
                if module is others[0][1]:
                    _measure(run, buffer, live, x, splits=splits)  # makes tables that blocks share
                    measured = _measure(run, buffer, live, x, splits=splits)
                names = [f"{place}.{name}" for name, _ in module.named_parameters()]
                trained = [name for name in names if name in buffer.views]
                self._measured[module] = _Measured(measured, trained, buffer)

    def run_module(
        self,
        module: nn.Module,
        x: Tensor,
        keys: Keys,
        documents: PackedDocuments | None,
        *,
        recompute: Recompute,
    ) -> Tensor:
        block = self._measured.get(module)
        if block is None:
            return super().run_module(module, x, keys, documents, recompute=recompute)
        out: Tensor = _MeasuredBlock.apply(x, block)  # type: ignore[no-untyped-call]
        return out


class _MeasuredBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: _Measured) -> Tensor:
        _touch(x, block.bytes.forward_peak)
        ctx.block, ctx.held = block, [x, _allocate(x, block.bytes.saved)]
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        block: _Measured = ctx.block
        _touch(gradient, block.bytes.backward_peak)
        ctx.held.clear()
        deferred = [_allocate(gradient, block.bytes.deferred)]
        if block.bytes.defers_gradient:
            deferred.append(gradient)
        block.buffer.run_or_defer(partial(_add_weight_gradients, block, deferred))
        return torch.empty_like(gradient), None


def _add_weight_gradients(block: _Measured, deferred: Sequence[Tensor]) -> None:
    """Needs the bytes of the weight gradients; the caller keeps the `deferred` tensors alive."""
    _touch(deferred[0], block.bytes.weight_peak)
    for name in block.names:
        block.buffer.count_microbatch(name)


def _measure(
    run: Callable[[Tensor], Tensor],
    buffer: GradBuffer,
    live: LiveBytes,
    like: Tensor,
    *,
    splits: bool,
) -> BlockBytes:
    """Runs forward and backward of a block, and returns the bytes of each part."""
    device = like.device.type

    def start() -> int:
        live.reset_peak()
        return live.current[device]

    x = torch.empty_like(like).requires_grad_()
    before = start()
    out = run(x)
    forward_peak, saved = live.peak[device] - before, live.current[device] - before - out.nbytes
    gradient, deferred = torch.empty_like(out), Deferred()
    before = start()
    with buffer.deferring(deferred if splits else None):
        torch.autograd.backward(out, gradient)
    backward_peak = live.peak[device] - before
    kept = live.current[device] - before + saved - like.nbytes  # `like.nbytes`: of x.grad
    before = live.current[device]
    del gradient
    defers_gradient = live.current[device] == before
    before = start()
    for add in deferred:
        add()
    weight_peak = live.peak[device] - before
    return BlockBytes(forward_peak, saved, backward_peak, kept, defers_gradient, weight_peak)


def _kind(block: nn.Module) -> object:
    """Returns a value that is equal for blocks that need equal bytes."""
    shapes = tuple((name, p.shape) for name, p in block.named_parameters())
    return type(block), getattr(block, "window", None), shapes


def _allocate(like: Tensor, num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=like.device)


def _touch(like: Tensor, num_bytes: int) -> None:
    """Allocates and frees `num_bytes` on the device of `like`."""
    _allocate(like, num_bytes)
