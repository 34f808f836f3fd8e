"""A copy of a stage's state in host memory; it is written to disk while training continues."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.tensors import pinned_empty

Key = tuple[str, ...]  # the names that lead to a tensor in nested mappings


def to_host(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `state` with its tensors in host memory; copies only tensors on a GPU."""
    return _map_tensors(state, lambda _, tensor: tensor.cpu())


class Snapshot:
    """Buffers in host memory for copies of a state; the first copy allocates the buffers.

    Every later state must have the same names, shapes and types. The buffers for GPU tensors are
    pinned, and the copies of all these tensors run at the same time.
    """

    def __init__(self) -> None:
        self._buffers: dict[Key, Tensor] = {}

    @torch.no_grad()
    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `state` with copied tensors, which stay unchanged until the next call."""
        devices = set[torch.device]()

        def copy(key: Key, tensor: Tensor) -> Tensor:
            if tensor.is_cuda:
                devices.add(tensor.device)
            if key not in self._buffers:
                self._buffers[key] = pinned_empty(tensor.shape, tensor.dtype, tensor.device)
            return self._buffers[key].copy_(tensor, non_blocking=True)

        copied = _map_tensors(state, copy)
        for device in devices:
            torch.cuda.synchronize(device)
        return copied


def _map_tensors(
    state: Mapping[str, Any], convert: Callable[[Key, Tensor], Tensor], start: Key = ()
) -> dict[str, Any]:
    """Returns a copy of `state` in which `convert` has replaced each tensor.

    `start` holds the names that lead from the outermost mapping to `state`.
    """
    converted = dict(state)
    for name, value in state.items():
        if isinstance(value, Mapping):
            converted[name] = _map_tensors(value, convert, (*start, name))
        elif isinstance(value, Tensor):
            converted[name] = convert((*start, name), value)
    return converted
