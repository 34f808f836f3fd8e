"""The peak speeds of common GPUs, by the name that torch.cuda.get_device_name returns.

The numbers are those of NVIDIA's data sheets and architecture white papers, at the boost clock: in
half precision dense products (not 2:4 sparse) on tensor cores that add in fp32, as torch's do; in
fp32 the CUDA cores, because fp32 training does not use TF32. GeForce cards add in fp32 at half the
rate with which they add in fp16; the larger numbers of their data sheets are for fp16 sums or for
sparse matrices. V100 and T4 have no tensor cores for bf16.

A GPU that the table lacks has no peak: the parts of a GPU that MIG and vGPU offer, and laptops'
GPUs, have names of their own, so the patterns match complete names.
"""

import re
from typing import NamedTuple


class DevicePeak(NamedTuple):
    """The peak of the GPUs whose complete name `pattern` matches, in 10^12 operations per second.

    A multiply-add counts as two operations. A number is None if the GPU has no such tensor cores.
    """

    pattern: str
    fp16: float
    bf16: float | None
    fp32: float


def _peak(pattern: str, half: float, fp32: float, *, has_bf16: bool = True) -> DevicePeak:
    return DevicePeak(pattern, half, half if has_bf16 else None, fp32)


_SIZE = r"(?: ?-?\d+GB)?"  # of the memory, where it is a part of the name
PEAKS = (
    # V100 data sheet (January 2020): PCIe, SXM2, V100S
    _peak(rf"Tesla V100-PCIE{_SIZE}", 112.0, 14.0, has_bf16=False),
    _peak(rf"Tesla V100-SXM[23]{_SIZE}(?:-LS)?", 125.0, 15.7, has_bf16=False),
    _peak(rf"Tesla V100S-PCIE{_SIZE}", 130.0, 16.4, has_bf16=False),
    # T4 data sheet (March 2019)
    _peak("Tesla T4", 65.0, 8.1, has_bf16=False),
    # A100 data sheet (June 2021); the A800 differs in NVLink only
    _peak(rf"A[18]00(?:-SXM4|-PCIE)?{_SIZE}(?: PCIe)?", 312.0, 19.5),
    # data sheets of A30, A10 and A40 (2021); AWS and NVIDIA, A10G (2021)
    _peak("A30", 165.0, 10.3),
    _peak("A10", 125.0, 31.2),
    _peak("A10G", 70.0, 35.0),
    _peak("A40", 149.7, 37.4),
    # GA102 white paper, appendix A; data sheets of RTX A6000, A5000, A4000 (sparse / 2)
    _peak("GeForce RTX 3080", 59.5, 29.8),
    _peak("GeForce RTX 3090", 71.0, 35.6),
    _peak("GeForce RTX 3090 Ti", 80.0, 40.0),
    _peak("RTX A4000", 76.7, 19.2),
    _peak("RTX A5000", 111.1, 27.8),
    _peak("RTX A6000", 154.8, 38.7),
    # Ada white papers (GeForce, professional), appendix A; data sheets of L4, L40, L40S (2023)
    _peak("GeForce RTX 4080", 97.5, 48.7),
    _peak("GeForce RTX 4090", 165.2, 82.6),
    _peak("RTX 6000 Ada Generation", 364.2, 91.1),
    _peak("L4", 121.0, 30.3),
    _peak("L40", 181.0, 90.5),
    _peak("L40S", 362.0, 91.6),
    # H100 data sheet (SXM, NVL) and H100 white paper (PCIe); H200 data sheet (SXM, NVL)
    _peak(r"H100 80GB HBM3", 989.4, 66.9),
    _peak(r"H100 PCIe", 756.0, 51.2),
    _peak(r"H100 NVL", 835.5, 60.0),
    _peak(r"H200", 989.4, 66.9),
    _peak(r"H200 NVL", 835.5, 60.0),
    _peak(r"GH200 (?:480GB|144G HBM3e)", 989.4, 66.9),
    # data sheets of HGX B200 (sums of 8 GPUs) and GB200 NVL72 (72 GPUs); half precision: sparse / 2
    _peak("B200", 2250.0, 75.0),
    _peak("GB200", 2500.0, 80.0),
    # RTX Blackwell white paper, appendix A
    _peak("GeForce RTX 5080", 112.6, 56.3),
    _peak("GeForce RTX 5090", 209.5, 104.8),
)


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Returns the peak in 10^12 operations per second; None if it is not known.

    Args:
        device_name: for example "NVIDIA A100-SXM4-80GB"; older drivers leave NVIDIA out.
        precision: fp32, fp16 or bf16.
    """
    name = device_name.removeprefix("NVIDIA ")
    for peak in PEAKS:
        if re.fullmatch(peak.pattern, name):
            found: float | None = getattr(peak, precision)
            return found
    return None
