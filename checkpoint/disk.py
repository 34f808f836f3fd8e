"""Whether the checkpoints of a run will fit, asked before it starts."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from checkpoint.files.tensor_files import format_bytes
from comm.communicator import Communicator
from comm.objects import gather_json


def check_disk(control: Communicator, path: Path, *, needed: int) -> None:
    """Every process calls it with the bytes it will write under `path`, which may not exist yet.

    ValueError where the processes of this machine together need more than is free.
    """
    existing = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
    here = [socket.gethostname(), existing.stat().st_dev]
    wants = gather_json(control, [here, needed])
    total = sum(want for where, want in wants if where == here)
    free = shutil.disk_usage(existing).free
    if needed and total > free:
        raise ValueError(
            f"--checkpoint-path {path}: the checkpoints of this run need {format_bytes(total)} on "
            f"this machine, {format_bytes(free)} is free; save less often, keep fewer "
            "(--keep-checkpoints) or make room"
        )
