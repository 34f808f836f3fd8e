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


def broadcast_bytes(group: Communicator, value: bytes, *, root: int = 0) -> bytes:
    """Member `root`'s value, on every member."""
    mine = group.rank == root
    size = torch.tensor([len(value) if mine else 0])
    group.broadcast(size, root=root)
    if not size.item():
        return b""
    data = torch.empty(int(size.item()), dtype=torch.uint8)
    if mine:
        data = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    group.broadcast(data, root=root)
    return data.numpy().tobytes()


def broadcast_json(group: Communicator, value: Any, *, root: int = 0) -> Any:
    """Member `root`'s value, on every member."""
    mine = json.dumps(value).encode() if group.rank == root else b""
    return json.loads(broadcast_bytes(group, mine, root=root))


def gather_json(group: Communicator, value: Any) -> list[Any]:
    """Every member's value, in the order of the members."""
    data = _encode(value)
    sizes = group.all_gather(torch.tensor([data.numel()])).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = group.all_gather(padded)
    return [_decode(row[:size]) for row, size in zip(rows, sizes, strict=True)]
