"""Flags of precision and memory."""

from __future__ import annotations

from arguments.flag import Flag
from arguments.values import real, size, switch, whole

PRECISION_FLAGS = (
    Flag(
        "--fp16",
        "compute in fp16, weights and moments in fp32",
        default=False,
        type=switch,
        is_common=True,
    ),
    Flag(
        "--bf16",
        "compute in bf16, weights and moments in fp32",
        default=False,
        type=switch,
        is_common=True,
    ),
    Flag(
        "--recompute",
        "recompute a block's activations in backward",
        default=True,
        type=switch,
        on_resume="may change",
    ),
    Flag(
        "--use-offload",
        "master weights and moments in host memory",
        default=False,
        type=switch,
        on_resume="may change",
    ),
    Flag(
        "--cpu-matmul",
        "what multiplies fp32 matrices on a CPU: torch's default (MKL) or oneDNN; auto: what the "
        "checkpoint was made with, else oneDNN on AMD processors with AVX-512",
        default="auto",
        choices=("auto", "default", "onednn"),
    ),
    Flag(
        "--loss-scale",
        "fp16: a constant loss scale; 0: dynamic",
        default=0.0,
        type=real(),
        on_resume="may change",
    ),
    Flag(
        "--initial-loss-scale",
        "fp16: the first dynamic scale",
        default=32768.0,
        type=real(positive=True),
        on_resume="may change",
    ),
    Flag(
        "--min-loss-scale",
        "fp16: the smallest dynamic scale",
        default=1.0,
        type=real(positive=True),
        on_resume="may change",
    ),
    Flag(
        "--loss-scale-window",
        "fp16: clean updates in a row before the scale doubles",
        default=1000,
        type=whole(1),
        on_resume="may change",
    ),
    Flag(
        "--hysteresis",
        "fp16: overflows before the scale halves",
        default=2,
        type=whole(1),
        on_resume="may change",
    ),
    Flag(
        "--max-skipped-updates",
        "fp16: overflows in a row that end the run, with a checkpoint",
        default=50,
        type=whole(1),
        on_resume="may change",
    ),
    Flag(
        "--plan",
        "print what each stage will need, and end; needs config.json alone: no weights, no data, "
        "no other rank, and with --use-cuda true no GPU",
        default=False,
        type=switch,
        is_common=True,
    ),
    Flag(
        "--device-memory",
        "with --plan: the memory of a device, as 24GB (10^9 bytes) or 24GiB (2^30); where a stage "
        "needs more, the plan lists the flags that help, and the exit status is 1",
        type=size,
        metavar="SIZE",
    ),
    Flag(
        "--measure-memory",
        "log at the end the peak memory of tensors on each rank, beside the plan's; on a CPU the "
        "run takes longer",
        default=False,
        type=switch,
    ),
)
