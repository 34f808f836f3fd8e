"""CPU flags as they are read, for CPUs that this machine need not have."""

from pathlib import Path

import pytest
import torch

from modules.matmul import cpu_info
from modules.matmul.cpu_info import CpuInfo
from tests.support.cpus import CPUINFO, CPUS

ZEN_4 = CpuInfo("AuthenticAMD", "AMD EPYC 9654 96-Core Processor", True, True, False, False)
# kind: has fast matmuls of bf16, of fp16
FAST = {
    "Zen 3": (False, False),
    "Zen 4": (True, False),
    "Zen 5": (True, False),
    "Haswell": (False, False),
    "Ice Lake": (False, False),
    "Sapphire Rapids": (True, True),
    "Granite Rapids": (True, True),
    "half of AVX-512": (False, False),
    "Graviton": (False, False),
}


@pytest.mark.parametrize("kind", CPUINFO)
def test_half_precision_is_fast_where_there_are_instructions_for_it(kind: str) -> None:
    found = CPUS[kind]
    halves = (torch.bfloat16, torch.float16)
    assert tuple(map(found.has_fast_matmul, halves)) == FAST[kind]
    assert found.has_fast_matmul(torch.float32)


def test_this_machine_is_its_first_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"{CPUINFO['Zen 4']}\n{CPUINFO['Haswell']}\n")
    monkeypatch.setattr(cpu_info, "CPUINFO", path)
    assert CpuInfo.of_this_machine() == ZEN_4


# Where there is no /proc, torch tells the flags in its own spelling, but no vendor.
TORCH_TELLS = {
    "x86": (
        {
            "cpu_name": "a CPU",
            "avx512_f": True,
            "avx512_bw": True,
            "avx512_dq": True,
            "avx512_vl": True,
            "avx512_bf16": False,
            "amx_bf16": True,
            "num_sockets": 1,
        },
        CpuInfo("unknown", "a CPU", True, False, True, False),
    ),
    "arm": ({"cpu_name": "Apple M2", "neon": True, "bf16": True}, CpuInfo(name="Apple M2")),
}


@pytest.mark.parametrize("kind", TORCH_TELLS)
def test_without_proc_torch_tells(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, expected = TORCH_TELLS[kind]
    monkeypatch.setattr(cpu_info, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert CpuInfo.of_this_machine() == expected


def test_torch_knows_the_same_of_this_machine() -> None:
    found, torchs = CpuInfo.of_this_machine(), torch.cpu.get_capabilities()
    assert found.has_avx512 == torchs.get("avx512_bw", False)
    assert found.has_avx512_bf16 == torchs.get("avx512_bf16", False)
    assert found.has_amx == torchs.get("amx_bf16", False)
