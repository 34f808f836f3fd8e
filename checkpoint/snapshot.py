"""A copy of a stage's state in host memory, to be written while training changes the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Path = tuple[str, ...]


def on_host(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with its tensors in host memory, of which those that are there are not copied."""
    return {
        name: on_host(value)
        if isinstance(value, Mapping)
        else value.cpu()
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }


class Snapshot:
    """Copies into buffers that are made, and their memory touched, by the first copy.

    Later copies are of states of the same names, shapes and types. From a GPU they go into pinned
    memory, all at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[Path, Tensor] = {}

    @torch.no_grad()
    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """`state`, its tensors copied: they stay as they are until the next copy is taken."""
        devices = set[torch.device]()
        copied = self._copy(state, (), devices)
        for device in devices:
            torch.cuda.synchronize(device)
        return copied

    def _copy(
        self, state: Mapping[str, Any], path: Path, devices: set[torch.device]
    ) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for name, value in state.items():
            here = (*path, name)
            if isinstance(value, Mapping):
                copied[name] = self._copy(value, here, devices)
            elif isinstance(value, Tensor):
                copied[name] = self._buffer(here, value).copy_(value, non_blocking=True)
                if value.is_cuda:
                    devices.add(value.device)
            else:
                copied[name] = value
        return copied

    def _buffer(self, path: Path, like: Tensor) -> Tensor:
        if path not in self._buffers:
            self._buffers[path] = torch.empty(
                like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda
            )
        return self._buffers[path]
