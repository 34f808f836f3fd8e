"""Check 2: numerics in one process, on a GPU or a CPU.

Each section compares the project's arithmetic with Hugging Face's models, with torch or with fp64.
A row's value is the error divided by the allowed error, unless its unit says otherwise. An
allowed error is the project's tolerance in fp32, or 1.5 times the error of Hugging Face or torch.
"""

import os
import time
import traceback
from collections.abc import Callable

import torch

from modules.attention.sdpa import disable_cudnn_attention
from tests.gpu.numerics_host import check_copies, check_out_of_memory, check_tracer
from tests.gpu.numerics_layers import check_attention, check_head, check_rotary, draw
from tests.gpu.numerics_parity import (
    ALLOWED,
    check_dropout,
    check_fp32,
    check_half,
    check_same_bits,
)
from tests.gpu.numerics_update import check_update
from tests.gpu.report import CheckReport, Options, run_check

RESERVE = 12.0  # seconds before the limit after which no section starts


def check_true_fp32(report: CheckReport, options: Options) -> None:
    """Checks that products in fp32 are not rounded to TF32, and reports torch's setting.

    The project leaves torch's default, which is true fp32 for products. In fp32 the error of a sum
    of n positive products is at most n u / (1 - n u), u = 2^-24 (see `modules.matmul.backend`); all
    operands are between 1 and 1 + 2^-11, which TF32 rounds to 1, an error of about 2^-11.
    """
    a, b = (1 + draw(seed, 512, 512).abs().clamp(max=1) * 2.0**-11 for seed in (1, 2))
    device = torch.device(options.device)
    a, b = (matrix.float().to(device) for matrix in (a, b))
    exact = a.double() @ b.double()
    error = ((a @ b).double() - exact).abs().max() / exact.min()
    bound = 512 * 2.0**-24 / (1 - 512 * 2.0**-24)
    value = error.item() / bound
    report.expect("products in fp32 are true fp32", value <= 1, value, ALLOWED)
    setting = torch.get_float32_matmul_precision()
    report.measure("torch's precision of fp32 products", setting, note="the project leaves it")


SECTIONS: tuple[Callable[[CheckReport, Options], None], ...] = (
    check_true_fp32,
    check_fp32,
    check_half,
    check_rotary,
    check_attention,
    check_head,
    check_dropout,
    check_update,
    check_copies,
    check_tracer,
    check_same_bits,
    check_out_of_memory,
)


def check(report: CheckReport, options: Options) -> None:
    """Runs all sections; a section that raises an exception fails, and the next one runs."""
    # Deterministic algorithms need this variable before cuBLAS starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    start = time.monotonic()
    if options.is_cuda and not torch.cuda.is_available():
        report.not_here("torch finds no GPU")
        return
    disable_cudnn_attention()  # as in training
    for section in SECTIONS:
        begin, title = time.monotonic(), section.__name__.removeprefix("check_")
        if begin - start > options.limit - RESERVE:
            report.expect(f"section {title}: there is time", False)
            continue
        try:
            section(report, options)
        except Exception as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}"[:300]
            report.expect(f"section {title}: no exception", False, note=words)
        report.measure(f"section {title}", time.monotonic() - begin, "s")


if __name__ == "__main__":
    run_check(check)
