"""Check 0: what this machine has, and its two ceilings, the speed of copies and of matmuls.

Later checks are read against these numbers: a model cannot train faster than the matmul, and an
elementwise kernel or an update of the weights not faster than the copy on the device.
"""

import torch
from torch import Tensor

from comm.backends.cupy_nccl import load_library
from planning.cluster.matmul_rate import matmul_rate
from tests.gpu.report import CheckReport, Options, run_check
from tests.gpu.timing import time_calls

_SIZE = 8192  # of the square matrices
_DEVICE_BYTES, _HOST_BYTES = 2**30, 2**28  # of one copy


def check(report: CheckReport, options: Options) -> None:
    """Lists the machine, and measures copies and matmuls."""
    report.measure("torch", torch.__version__)
    report.measure("host threads of torch", str(torch.get_num_threads()))
    if options.is_cuda:
        device = torch.device("cuda", 0)
        _list_gpu(report, device)
        _copies(report, device)
        _matmul(report, device, torch.bfloat16)
        _matmul(report, device, torch.float32)
    else:
        _on_cpu(report)


def _list_gpu(report: CheckReport, device: torch.device) -> None:
    free, total = torch.cuda.mem_get_info(device)
    report.measure("GPU", torch.cuda.get_device_name(device))
    report.measure("free GPU memory", free / 2**30, "GiB", f"of {total / 2**30:.1f} GiB")
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    report.measure("the GPU computes in bf16", str(has_bf16))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    report.expect("fp32 matmuls are true fp32 (TF32 is off)", not tf32)
    try:
        nccl = load_library()
        report.expect("CuPy has NCCL", True, str(nccl.get_version()))
    except ValueError as error:
        report.expect("CuPy has NCCL", False, note=str(error))


def _copies(report: CheckReport, device: torch.device) -> None:
    """Measures the bytes per second that a copy moves; on the device it reads and writes each."""
    source = torch.randint(256, (_DEVICE_BYTES,), dtype=torch.uint8, device=device)
    _copy(report, "copy on the device (read and write)", torch.empty_like(source), source, passes=2)
    part = source[:_HOST_BYTES]
    for kind, pinned in (("pinned", True), ("pageable", False)):
        host = torch.empty(_HOST_BYTES, dtype=torch.uint8, pin_memory=pinned)
        _copy(report, f"copy to {kind} host memory", host, part)
        _copy(report, f"copy from {kind} host memory", part, host)


def _copy(report: CheckReport, name: str, target: Tensor, source: Tensor, passes: int = 1) -> None:
    device = source.device if source.is_cuda else target.device
    took = time_calls(lambda: target.copy_(source, non_blocking=True), device, repeats=5)
    num_bytes = passes * source.numel() * source.element_size()
    report.measure(name, num_bytes / took.median / 1e6, "GB/s", took.spread)


def _matmul(report: CheckReport, device: torch.device, dtype: torch.dtype) -> None:
    """Measures a product of random numbers; products of ones need less power and are faster."""
    a, b = (torch.randn(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    took = time_calls(lambda: torch.mm(a, b, out=out), device, repeats=7, inner=4)
    name = f"matmul {_SIZE} x {_SIZE} x {_SIZE}, {dtype}".replace("torch.", "")
    report.measure(name, 2 * _SIZE**3 / took.median / 1e9, "TFLOP/s", took.spread)
    report.expect(f"{name} is finite", bool(out.isfinite().all()))


def _on_cpu(report: CheckReport) -> None:
    rate = matmul_rate(
        rows=256,
        inputs=512,
        outputs=512,
        dtype=torch.float32,
        device=torch.device("cpu"),
        budget=0.1,
    )
    report.measure("matmul 256 x 512 x 512, float32", 2 * rate / 1e9, "GFLOP/s")
    report.expect("the matmul's rate is positive", rate > 0)


if __name__ == "__main__":
    run_check(check)
