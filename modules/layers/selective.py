"""Selective recompute: backward computes the outputs of norms and activation functions again.

These outputs are cheap to compute, but they are almost half of a block's activations: the following
linear layers save them for backward. With selective recompute, a linear layer keeps a recipe in
place of such an output: the module and its input. The input needs no more memory, because the
module's own backward keeps it. Attention and the products of linear layers are not computed again,
so the results have the same bits at almost the same speed. (Korthikanti et al., arXiv 2205.05198,
select attention instead; attention kernels that save no scores made that unnecessary.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from modules.layers.norm import RMSNorm

# The activations of a block that backward computes again: none, the cheap ones, or all of them.
Recompute = Literal["none", "selective", "full"]
# The modes by the value of --recompute, the fastest first.
MODES: dict[str, Recompute] = {"false": "none", "selective": "selective", "true": "full"}

# Modules whose backward keeps their input but not their output. (The backward of ReLU, for example,
# keeps the output, so a recipe would save nothing.)
CHEAP = (nn.LayerNorm, RMSNorm, nn.GELU, nn.SiLU)


@contextmanager
def recompute_selectively(block: nn.Module) -> Iterator[None]:
    """In the `with` block, forward of `block` saves no outputs of its cheap modules."""
    outputs = _CheapOutputs()
    cheap = [module for module in block.modules() if isinstance(module, CHEAP)]
    handles = [module.register_forward_hook(outputs.note) for module in cheap]
    try:
        with saved_tensors_hooks(outputs.pack, _unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Output:
    """The recipe of an output: the module and its input; computed once for all that saved it."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self._module, self._x = module, x.detach()
        self._num_saved = 0
        self._computed: Tensor | None = None

    def save(self) -> "_Output":
        self._num_saved += 1
        return self

    def compute(self) -> Tensor:
        """Returns the output; keeps it until all operations that saved it have called this."""
        out = self._computed
        if out is None:
            with torch.no_grad():
                out = self._module(self._x)
        self._num_saved -= 1
        self._computed = out if self._num_saved > 0 else None
        return out


class _Saved(NamedTuple):
    """A tensor that shares the storage of an output, as an operation saved it for backward."""

    output: _Output
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _CheapOutputs:
    """The outputs of a block's cheap modules during forward, found by their storage.

    The dictionary keeps no output alive. Its values have the version of the output, so that an
    output that was changed in place is saved as any other tensor.
    """

    def __init__(self) -> None:
        self._of_storage: WeakKeyDictionary[Any, tuple[int, _Output]] = WeakKeyDictionary()

    def note(self, module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        """Remembers the output of a cheap module; this is a forward hook."""
        self._of_storage[out.untyped_storage()] = out._version, _Output(module, *inputs)

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        """Returns the object that autograd keeps in place of `tensor`.

        A tensor that an operation returns and saves must be detached; otherwise the operation and
        the tensor keep each other alive.
        """
        version, output = self._of_storage.get(tensor.untyped_storage(), (None, None))
        if output is None or version != tensor._version:
            return tensor.detach()
        offset = int(tensor.storage_offset())
        return _Saved(output.save(), tensor.size(), tensor.stride(), offset)


def _unpack(kept: Tensor | _Saved) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.output.compute().as_strided(kept.size, kept.stride, kept.offset)
