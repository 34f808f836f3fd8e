"""The model and optimizer of a stage for a dry run: they need no memory and compute no values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modules.attention.cpu import causal_mask
from modules.attention.window import window_mask
from modules.layers.dropout import KeyedDropout
from modules.layers.rotary import rotation
from modules.stage_model import StageModel
from optimizer.adam import Algorithm
from planning.memory.live_bytes import LiveBytes

SMALLEST_IN_8_BITS = 4096  # elements; for smaller weights, bitsandbytes keeps fp32 moments
BLOCK_OF_8_BITS = 256  # elements that share a scale


class WithoutSteps:
    """An optimizer algorithm for a GPU's memory plan; steps need no memory, so `step` is empty."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self.kind = algorithm.kind

    def empty_state(self, weight: Tensor) -> dict[str, Tensor]:
        return self._algorithm.empty_state(weight)

    def step(self, *_: object, **__: object) -> None:
        """Does nothing."""


class Adam8bitStates:
    """The states of `optimizer.adam_8bit.Adam8bit`, with the same shapes; needs no bitsandbytes."""

    kind = "8bit-adam"

    def __init__(self) -> None:
        self._tables: dict[str, Tensor] = {}

    def empty_state(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.numel() < SMALLEST_IN_8_BITS:
            return {name: torch.zeros_like(weight) for name in ("state1", "state2")}
        if not self._tables:
            names = ("qmap1", "qmap2")
            self._tables = {name: torch.zeros(256, device=weight.device) for name in names}
        state = dict(self._tables)
        num_blocks = -(-weight.numel() // BLOCK_OF_8_BITS)
        for number in (1, 2):
            state[f"state{number}"] = torch.zeros_like(weight, dtype=torch.uint8)
            state[f"absmax{number}"] = torch.zeros(num_blocks, device=weight.device)
        return state

    def step(self, *_: object, **__: object) -> None:
        """Does nothing."""


@contextmanager
def tensors_without_memory() -> Iterator[LiveBytes]:
    """Makes all tensors in the `with` block fake.

    Cached tables are cleared before and after the block, so that no real table is used in the
    block, and no fake table after it.
    """
    _clear_tables()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
            yield live
    finally:
        _clear_tables()


def fill_without_values(model: StageModel, device: torch.device) -> None:
    """Replaces all parameters with uninitialized ones on `device`."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(empty))


def draw_no_dropout(model: StageModel) -> None:
    """Disables dropout masks, because the meta device, which stands for a GPU, cannot draw them."""
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.draw_ = lambda mask, keys: None  # type: ignore[method-assign]


def _clear_tables() -> None:
    rotation.cache_clear()
    causal_mask.cache_clear()
    window_mask.cache_clear()
