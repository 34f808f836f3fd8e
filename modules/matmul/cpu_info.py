"""The CPU of this machine: its name and instructions, as the system lists them.

The CPU determines the library of fp32 matmuls, and whether matmuls in half precision are computed
in fp32 and rounded. Both change the order of sums. So two runs of a command on the same type of
machine must find the same instructions. Therefore this module only reads what the system lists; it
measures no speed, because a measured speed differs from run to run.
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

    has_avx512: whether it has AVX-512 F, BW, DQ and VL, which oneDNN's AVX-512 kernels need.
    has_avx512_bf16: whether it has AVX512-BF16, for bf16 matmuls.
    has_amx: whether it has AMX-BF16, for bf16 matmuls.
    has_fp16_matmul: whether it has AVX512-FP16 or AMX-FP16, for fp16 matmuls; F16C can only
        convert.
    """

    vendor: str = UNKNOWN
    name: str = UNKNOWN
    has_avx512: bool = False
    has_avx512_bf16: bool = False
    has_amx: bool = False
    has_fp16_matmul: bool = False

    @classmethod
    def of_this_machine(cls) -> "CpuInfo":
        """Returns this machine's first CPU; instructions that are not listed count as missing."""
        try:
            return cls.from_cpuinfo(_first_entry(CPUINFO))
        except OSError:
            capabilities = torch.cpu.get_capabilities()
            name = str(capabilities.get("cpu_name") or platform.processor() or UNKNOWN)
            flags = [flag for flag, present in capabilities.items() if present is True]
            return cls.from_flags(UNKNOWN, name, flags)

    @classmethod
    def from_cpuinfo(cls, text: str) -> "CpuInfo":
        """Parses an entry of Linux's /proc/cpuinfo; on ARM the keys differ, so nothing is known."""
        pairs = (line.partition(":") for line in text.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        return cls.from_flags(
            fields.get("vendor_id", UNKNOWN),
            fields.get("model name", UNKNOWN),
            fields.get("flags", "").split(),
        )

    @classmethod
    def from_flags(cls, vendor: str, name: str, flags: Collection[str]) -> "CpuInfo":
        """Returns the CPU with `flags`, in Linux's or torch's spelling (avx512bw, avx512_bw)."""
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
        """Returns whether matmuls of `dtype` are at least as fast as fp32 matmuls.

        If the CPU has no matmul instructions for `dtype`, torch converts number by number, which is
        slow. Measured on one thread of a Zen 3 CPU (AVX2), 256x512 by 512x2048, torch 2.13: fp32
        5.9 ms, bf16 55 ms, fp16 46 ms. If the matrices are converted to fp32 and the product is
        rounded, bf16 takes 6.2 ms and fp16 6.0 ms.
        """
        if dtype == torch.bfloat16:
            return self.has_avx512_bf16 or self.has_amx
        if dtype == torch.float16:
            return self.has_fp16_matmul
        return True


def _first_entry(path: Path) -> str:
    """Returns the entry of the first CPU, because reading the entries of all CPUs is slow."""
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                break
            lines.append(line)
    return "".join(lines)
