"""The CPU of this machine, identified by its flags and never by a timing.

The matmul library and the rounding of half precision follow from it, and they decide the order of
sums: two runs of one command on the same kind of machine must choose alike.
"""

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
AMD = "AuthenticAMD"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class CpuInfo:
    """A CPU: its vendor as CPUID spells it, and its instructions.

    has_avx512: F, BW, DQ and VL, which oneDNN's AVX-512 kernels need.
    has_avx512_bf16, has_amx: matmuls of bf16 (AVX512-BF16, AMX-BF16).
    has_fp16_matmul: matmuls of fp16 (AVX512-FP16, AMX-FP16); F16C alone only converts.
    """

    vendor: str = UNKNOWN
    name: str = UNKNOWN
    has_avx512: bool = False
    has_avx512_bf16: bool = False
    has_amx: bool = False
    has_fp16_matmul: bool = False

    @classmethod
    def of_this_machine(cls) -> "CpuInfo":
        """Reads the first CPU of this machine; one without any flags where nothing is known."""
        try:
            return cls.from_cpuinfo(_first_entry(CPUINFO))
        except OSError:
            capabilities = torch.cpu.get_capabilities()
            name = str(capabilities.get("cpu_name") or platform.processor() or UNKNOWN)
            flags = [flag for flag, present in capabilities.items() if present is True]
            return cls.from_flags(UNKNOWN, name, flags)

    @classmethod
    def from_cpuinfo(cls, text: str) -> "CpuInfo":
        """Parses an entry of Linux's /proc/cpuinfo; on ARM, with other keys, all is unknown."""
        pairs = (line.partition(":") for line in text.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        return cls.from_flags(
            fields.get("vendor_id", UNKNOWN),
            fields.get("model name", UNKNOWN),
            fields.get("flags", "").split(),
        )

    @classmethod
    def from_flags(cls, vendor: str, name: str, flags: Collection[str]) -> "CpuInfo":
        """Reads the names of flags as Linux or torch spell them (avx512bw, avx512_bw)."""
        has = {flag.replace("_", "") for flag in flags}
        return cls(
            vendor=vendor,
            name=name,
            has_avx512={"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= has,
            has_avx512_bf16="avx512bf16" in has,
            has_amx="amxbf16" in has,
            has_fp16_matmul=not has.isdisjoint({"avx512fp16", "amxfp16"}),
        )

    def has_fast_matmul(self, dtype: torch.dtype) -> bool:
        """Tells whether matmuls of `dtype` are at least as fast as those of fp32.

        Without instructions for them, torch converts number by number. One thread of a Zen 3 CPU
        (AVX2), 256x512 by 512x2048, torch 2.13: fp32 5.9 ms; bf16 55 ms and fp16 46 ms; converted
        to fp32, multiplied and rounded 6.2 ms and 6.0 ms.
        """
        if dtype == torch.bfloat16:
            return self.has_avx512_bf16 or self.has_amx
        if dtype == torch.float16:
            return self.has_fp16_matmul
        return True


def _first_entry(path: Path) -> str:
    """Reads up to the first empty line: all entries of 256 CPUs take a while."""
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                break
            lines.append(line)
    return "".join(lines)
