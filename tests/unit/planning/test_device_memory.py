"""Tests which memory a process may use: of a GPU, of a machine, or of its cgroups."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from planning.memory import device_memory as module
from planning.memory.device_memory import PROCESS_BYTES, device_memory, machine_memory

GB, TOTAL = 10**9, 64 * 10**6 * 1024
UNLIMITED = "9223372036854771712"  # version 1 writes the largest number of pages
BATCH = "0::/slurm/job/step\n"
DOCKER = "12:cpu:/\n5:cpuacct,memory:/docker/abc\n"
CASES: list[tuple[str, dict[str, str], int]] = [
    (BATCH, {}, TOTAL),
    (BATCH, {"slurm/job/step/memory.max": "max", "memory.max": "max"}, TOTAL),
    (BATCH, {"slurm/job/step/memory.max": "max", "slurm/memory.max": f"{9 * GB}"}, 9 * GB),
    (BATCH, {"slurm/memory.max": f"{9 * GB}", "slurm/job/memory.max": f"{8 * GB}"}, 8 * GB),
    ("0::/\n", {"memory.max": f"{7 * GB}\n"}, 7 * GB),
    (BATCH, {"memory.max": f"{100 * GB}"}, TOTAL),
    # A version 1 container sees its own group at the root, and the host's path.
    (DOCKER, {"memory/memory.limit_in_bytes": f"{6 * GB}"}, 6 * GB),
    (DOCKER, {"memory/docker/abc/memory.limit_in_bytes": UNLIMITED}, TOTAL),
]


@pytest.mark.parametrize(("groups", "limits", "expected"), CASES)
def test_the_memory_of_the_machine_or_its_lowest_limit(
    groups: str, limits: dict[str, str], expected: int, tmp_path: Path
) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    files |= {"proc/self/cgroup": groups}
    files |= {"proc/meminfo": f"MemFree: 1 kB\nMemTotal:       {TOTAL // 1024} kB\nSwap: 2 kB\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine_memory(tmp_path) == expected


def test_this_machine_has_memory() -> None:
    assert machine_memory() > 10**8


def test_ranks_share_a_machine_but_not_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "machine_memory", lambda: 40 * GB)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert device_memory(cpu, ranks_here=1) == 36 * GB - PROCESS_BYTES
    assert device_memory(cpu, ranks_here=4) == 9 * GB - PROCESS_BYTES
    assert device_memory(cpu, ranks_here=400) == 0
    properties = SimpleNamespace(total_memory=80 * GB)
    with patch("torch.cuda.get_device_properties", return_value=properties) as of_device:
        assert device_memory(gpu, ranks_here=4) == 72 * GB
    of_device.assert_called_once_with(gpu)
