"""The memory that the tensors of one process may use, on a GPU or on a CPU.

A run needs memory that a plan does not count. The reserves below are left out of the device's
memory; they are estimates.

On a GPU, a tenth: the CUDA context takes 0.3 to 0.6 GB, NCCL's buffers and cuBLAS's workspace some
hundred MB, and torch's allocator cannot use some fragments. No run on a GPU has checked this yet.

On a CPU, a tenth, for other programs and for fragments, and 0.7 GB for each process: the peak RSS
of a tiny run is 0.45 GB (torch and transformers); the processes of --data-workers need more.
"""

import re
from pathlib import Path

import torch

SHARE = 0.9
PROCESS_BYTES = 7 * 10**8  # on a CPU, beside tensors


def device_memory(device: torch.device, *, ranks_here: int) -> int:
    """Returns the bytes that this process's tensors may use on `device`.

    Args:
        ranks_here: the number of ranks on this machine; on a CPU they share its memory.
    """
    if device.type == "cuda":
        return int(SHARE * torch.cuda.get_device_properties(device).total_memory)
    return max(0, int(SHARE * machine_memory() / ranks_here) - PROCESS_BYTES)


def machine_memory(root: Path = Path("/")) -> int:
    """Returns the bytes of this machine's memory, or of the lowest cgroup limit of this process.

    Batch systems and containers limit the memory of a group of processes. The group of this process
    and all groups above it may have a limit, in the files of version 1 or 2.

    Args:
        root: the folder of proc and sys.
    """
    meminfo = (root / "proc/meminfo").read_text(encoding="ascii")
    total = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.MULTILINE)
    assert total is not None, "Linux has this line"
    return min([int(total[1]) * 1024, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    folder, limits = root / "sys/fs/cgroup", []
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in groups:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, name = folder, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = folder / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, but the limit is then in the root folder.
        inner = base / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(base):
                limits += _limit(group / name)
    return limits


def _limit(file: Path) -> list[int]:
    """Returns the number in `file`; nothing without such a file, and for "max"."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return []
    return [int(text)] if text.isdecimal() else []
