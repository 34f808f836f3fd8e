"""Tests the table of GPU peaks against the arithmetic of the chips, and the names of devices."""

import pytest

from monitor.device_peaks import PEAKS, peak_tflops

# Multiprocessors, floating-point operations of their tensor cores per clock (fp16 with fp32 sums),
# and boost clock in GHz, from the tables of the architecture white papers.
CHIPS = {
    "Tesla V100-SXM2-16GB": (80, 1024, 1.53),
    "Tesla V100-PCIE-32GB": (80, 1024, 1.38),
    "Tesla T4": (40, 1024, 1.59),
    "A100-SXM4-40GB": (108, 2048, 1.41),
    "NVIDIA A100 80GB PCIe": (108, 2048, 1.41),
    "NVIDIA A30": (56, 2048, 1.44),
    "NVIDIA A10": (72, 1024, 1.695),
    "NVIDIA A10G": (80, 512, 1.71),
    "NVIDIA A40": (84, 1024, 1.74),
    "NVIDIA RTX A6000": (84, 1024, 1.80),
    "NVIDIA GeForce RTX 3090": (82, 512, 1.695),
    "NVIDIA GeForce RTX 4090": (128, 512, 2.52),
    "NVIDIA GeForce RTX 5090": (170, 512, 2.407),
    "NVIDIA RTX 6000 Ada Generation": (142, 1024, 2.505),
    "NVIDIA L4": (58, 1024, 2.04),
    "NVIDIA L40": (142, 512, 2.49),
    "NVIDIA L40S": (142, 1024, 2.49),
    "NVIDIA H100 80GB HBM3": (132, 4096, 1.83),
    "NVIDIA H100 PCIe": (114, 4096, 1.62),
    "NVIDIA H200": (132, 4096, 1.83),
}


@pytest.mark.parametrize("name", CHIPS)
def test_a_peak_in_half_precision_is_that_of_the_tensor_cores(name: str) -> None:
    count, per_clock, gigahertz = CHIPS[name]
    assert peak_tflops(name, "fp16") == pytest.approx(count * per_clock * gigahertz / 1e3, rel=0.01)


def test_the_fp32_peak_is_that_of_the_cuda_cores() -> None:
    """An SM has 64 CUDA cores in V100, T4 and A100, and 128 in Ada and Hopper; no TF32."""
    for name, count, cores, gigahertz in [
        ("Tesla T4", 40, 64, 1.59),
        ("NVIDIA A100-SXM4-80GB", 108, 64, 1.41),
        ("NVIDIA GeForce RTX 4090", 128, 128, 2.52),
        ("NVIDIA H100 PCIe", 114, 128, 1.755),
    ]:
        expected = count * cores * 2 * gigahertz / 1e3
        assert peak_tflops(name, "fp32") == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "has_tensor_cores"),
    [("Tesla T4", False), ("Tesla V100-SXM2-32GB", False)]
    + [(name, True) for name in ("NVIDIA A10", "NVIDIA L4", "NVIDIA B200", "NVIDIA GB200")],
)
def test_bf16_has_a_peak_where_it_has_tensor_cores(name: str, has_tensor_cores: bool) -> None:
    expected = peak_tflops(name, "fp16") if has_tensor_cores else None
    assert peak_tflops(name, "bf16") == expected


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A40-48Q",
        "GRID A100-10C",
        "NVIDIA GeForce GTX 1080 Ti",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_parts_of_a_gpu_and_other_gpus_have_no_known_peak(name: str) -> None:
    assert [peak_tflops(name, precision) for precision in ("fp32", "fp16", "bf16")] == [None] * 3


def test_every_row_is_a_gpu_with_faster_half_precision() -> None:
    assert len({peak.pattern for peak in PEAKS}) == len(PEAKS)
    assert all(1.9 * peak.fp32 < peak.fp16 < 40 * peak.fp32 for peak in PEAKS)
