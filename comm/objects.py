"""Collectives of bytes and small JSON values, without pickle."""

import json
from typing import Any

import torch

from comm.communicator import Communicator


def broadcast_bytes(group: Communicator, value: bytes, *, root: int = 0) -> bytes:
    """Returns the bytes of member `root` on every member."""
    is_root = group.rank == root
    size = torch.tensor([len(value) if is_root else 0])
    group.broadcast(size, root=root)
    if not size.item():
        return b""
    data = torch.empty(int(size.item()), dtype=torch.uint8)
    if is_root:
        data = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    group.broadcast(data, root=root)
    return data.numpy().tobytes()


def broadcast_json(group: Communicator, value: Any, *, root: int = 0) -> Any:
    """Returns the JSON value of member `root` on every member."""
    encoded = json.dumps(value).encode() if group.rank == root else b""
    return json.loads(broadcast_bytes(group, encoded, root=root))


def gather_json(group: Communicator, value: Any) -> list[Any]:
    """Returns the JSON values of all members, in the order of the members."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = group.all_gather(torch.tensor([data.numel()])).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = group.all_gather(padded)
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]
