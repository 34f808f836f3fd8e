"""What the processor of this machine is, by its flags and never by a timing.

What follows from it (which library multiplies, whether half precision is fast) decides the order of
sums, so that two runs of one command on one kind of machine must decide alike.
"""

from __future__ import annotations

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
    """A processor: its vendor as CPUID spells it, and what it has instructions for.

    has_avx512: F, BW, DQ and VL, which oneDNN's AVX-512 kernels need.
    has_avx512_bf16, has_amx: products of bf16 (AVX512-BF16, AMX-BF16).
    has_fp16_products: products of fp16 (AVX512-FP16, AMX-FP16); F16C alone only converts.
    """

    vendor: str = UNKNOWN
    name: str = UNKNOWN
    has_avx512: bool = False
    has_avx512_bf16: bool = False
    has_amx: bool = False
    has_fp16_products: bool = False

    @classmethod
    def of_this_machine(cls) -> CpuInfo:
        """Of the first processor of this machine; where nothing tells, one that has nothing."""
        try:
            return cls.from_cpuinfo(_first_entry(CPUINFO))
        except OSError:
            known = torch.cpu.get_capabilities()
            name = str(known.get("cpu_name") or platform.processor() or UNKNOWN)
            return cls.from_flags(UNKNOWN, name, [key for key, has in known.items() if has is True])

    @classmethod
    def from_cpuinfo(cls, text: str) -> CpuInfo:
        """Of an entry of Linux's /proc/cpuinfo; on ARM its keys are others, and nothing is told."""
        pairs = (line.partition(":") for line in text.splitlines())
        found = {key.strip(): value.strip() for key, _, value in pairs}
        return cls.from_flags(
            found.get("vendor_id", UNKNOWN),
            found.get("model name", UNKNOWN),
            found.get("flags", "").split(),
        )

    @classmethod
    def from_flags(cls, vendor: str, name: str, flags: Collection[str]) -> CpuInfo:
        """Of the names of flags as Linux or torch spell them (avx512bw, avx512_bw)."""
        has = {flag.replace("_", "") for flag in flags}
        return cls(
            vendor=vendor,
            name=name,
            has_avx512={"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= has,
            has_avx512_bf16="avx512bf16" in has,
            has_amx="amxbf16" in has,
            has_fp16_products=not has.isdisjoint({"avx512fp16", "amxfp16"}),
        )

    def has_fast_products(self, dtype: torch.dtype) -> bool:
        """Whether products of matrices of `dtype` are at least as fast as those of fp32.

        Without instructions for them torch converts number by number. One thread of a Zen 3
        processor (AVX2), 256x512 by 512x2048, torch 2.13: fp32 5.9 ms; bf16 55 ms and fp16 46 ms;
        converted to fp32, multiplied and rounded 6.2 ms and 6.0 ms.
        """
        if dtype == torch.bfloat16:
            return self.has_avx512_bf16 or self.has_amx
        if dtype == torch.float16:
            return self.has_fp16_products
        return True


def has_fast_products(dtype: torch.dtype) -> bool:
    """`CpuInfo.has_fast_products` of this machine; reads a file: ask once."""
    return CpuInfo.of_this_machine().has_fast_products(dtype)


def _first_entry(path: Path) -> str:
    """Up to the first empty line: the entries of 256 processors take a while to read."""
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                break
            lines.append(line)
    return "".join(lines)
