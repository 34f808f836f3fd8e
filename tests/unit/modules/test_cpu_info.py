"""Tests that the features of several CPUs are read correctly, from /proc/cpuinfo or torch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from modules.matmul import cpu_info
from modules.matmul.cpu_info import CpuInfo
from tests.support.cpus import CPUINFO, CPUS

ZEN_4 = CpuInfo("AuthenticAMD", "AMD EPYC 9654 96-Core Processor", True, True, False, False)
WITH_AVX512 = {"Zen 4", "Zen 5", "Ice Lake", "Sapphire Rapids", "Granite Rapids"}
WITH_BF16 = {"Zen 4", "Zen 5", "Sapphire Rapids", "Granite Rapids"}
WITH_FP16 = {"Sapphire Rapids", "Granite Rapids"}


@pytest.mark.parametrize("kind", CPUINFO)
def test_half_precision_is_fast_where_there_are_instructions_for_it(kind: str) -> None:
    found = CPUS[kind]
    assert found.has_avx512 == (kind in WITH_AVX512)
    assert found.has_fast_matmul(torch.bfloat16) == (kind in WITH_BF16)
    assert found.has_fast_matmul(torch.float16) == (kind in WITH_FP16)
    assert found.has_fast_matmul(torch.float32)


def test_this_machine_is_its_first_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"{CPUINFO['Zen 4']}\n{CPUINFO['Haswell']}\n")
    monkeypatch.setattr(cpu_info, "CPUINFO", path)
    assert CpuInfo.of_this_machine() == ZEN_4


# Without /proc, torch reports the flags in its own spelling, and no vendor.
ALL_BUT_BF16 = dict.fromkeys(("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "amx_bf16"), True)
TORCH_TELLS: dict[str, tuple[dict[str, Any], CpuInfo]] = {
    "x86": ({"cpu_name": "a CPU", **ALL_BUT_BF16}, CpuInfo("unknown", "a CPU", True, False, True)),
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
