"""A copy of a stage's state in host memory, written to disk while training changes the original."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, ...]  # the names on the way to a tensor in nested mappings


def to_host(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `state` with its tensors in host memory; those that are there are not copied."""
    return {
        name: to_host(value)
        if isinstance(value, Mapping)
        else value.cpu()
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }


class Snapshot:
    """Buffers in host memory, allocated and touched by the first copy.

    Later copies are of states with the same names, shapes and types. Copies from a GPU use pinned
    memory, all at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[Key, Tensor] = {}

    @torch.no_grad()
    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `state` with copied tensors, which do not change until the next copy is taken."""
        devices = set[torch.device]()
        copied = self._copy(state, (), devices)
        for device in devices:
            torch.cuda.synchronize(device)
        return copied

    def _copy(
        self, state: Mapping[str, Any], key: Key, devices: set[torch.device]
    ) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for name, value in state.items():
            inner = (*key, name)
            if isinstance(value, Mapping):
                copied[name] = self._copy(value, inner, devices)
            elif isinstance(value, Tensor):
                copied[name] = self._buffer(inner, value).copy_(value, non_blocking=True)
                if value.is_cuda:
                    devices.add(value.device)
            else:
                copied[name] = value
        return copied

    def _buffer(self, key: Key, like: Tensor) -> Tensor:
        if key not in self._buffers:
            self._buffers[key] = torch.empty(
                like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda
            )
        return self._buffers[key]
