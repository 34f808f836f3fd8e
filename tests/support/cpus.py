"""Entries of /proc/cpuinfo, shortened to the lines that distinguish CPUs."""

from modules.matmul.cpu_info import CpuInfo

_AVX2 = "fpu sse sse2 ssse3 fma sse4_1 sse4_2 avx f16c avx2"
_AVX512 = f"{_AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"


def _entry(vendor: str, name: str, flags: str) -> str:
    return (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 25\nmodel name\t: {name}\n"
        f"fpu\t\t: yes\nflags\t\t: {flags}\nbugs\t\t:\n"
    )


CPUINFO = {
    "Zen 3": _entry("AuthenticAMD", "AMD EPYC 7763 64-Core Processor", _AVX2),
    "Zen 4": _entry("AuthenticAMD", "AMD EPYC 9654 96-Core Processor", f"{_AVX512} avx512_bf16"),
    "Zen 5": _entry(
        "AuthenticAMD", "AMD EPYC 9755 128-Core Processor", f"{_AVX512} avx_vnni avx512_bf16"
    ),
    "Haswell": _entry("GenuineIntel", "Intel(R) Xeon(R) CPU E5-2680 v3 @ 2.50GHz", _AVX2),
    "Ice Lake": _entry("GenuineIntel", "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", _AVX512),
    "Sapphire Rapids": _entry(
        "GenuineIntel",
        "Intel(R) Xeon(R) Platinum 8480+",
        f"{_AVX512} avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8",
    ),
    "Granite Rapids": _entry(
        "GenuineIntel",
        "Intel(R) Xeon(R) 6980P",
        f"{_AVX512} avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8 amx_fp16",
    ),
    "half of AVX-512": _entry("AuthenticAMD", "an emulator", f"{_AVX2} avx512f avx512cd"),
    "Graviton": (
        "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd fphp asimdhp sve bf16 i8mm\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    ),
}

CPUS = {kind: CpuInfo.from_cpuinfo(text) for kind, text in CPUINFO.items()}
