"""Small JSON values between all processes of a group: nothing is pickled."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from comm.communicator import Communicator


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    return json.loads(bytes(data.tolist()))


def broadcast_json(group: Communicator, value: Any, *, root: int = 0) -> Any:
    """Member `root`'s value, on every member."""
    data = _encode(value) if group.rank == root else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    group.broadcast(size, root=root)
    if group.rank != root:
        data = torch.empty(int(size.item()), dtype=torch.uint8)
    group.broadcast(data, root=root)
    return _decode(data)


def gather_json(group: Communicator, value: Any) -> list[Any]:
    """Every member's value, in the order of the members."""
    data = _encode(value)
    sizes = group.all_gather(torch.tensor([data.numel()])).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = group.all_gather(padded)
    return [_decode(row[:size]) for row, size in zip(rows, sizes, strict=True)]
