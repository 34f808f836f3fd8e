"""Flags of the updates: their number, their size and the optimizer."""

from __future__ import annotations

from arguments.flag import Flag
from arguments.values import MAX_RATE, real, whole

UPDATE_FLAGS = (
    Flag(
        "--total-steps",
        "iterations; --gradient-accumulate-step of them make one update",
        required=True,
        type=whole(1),
        is_common=True,
        on_resume="may change",
    ),
    Flag(
        "--lr",
        "learning rate at the end of the warm-up",
        default=1e-5,
        type=real(at_most=MAX_RATE),
        is_common=True,
        on_resume="may change",
    ),
    Flag(
        "--warmup-steps",
        "updates of linear warm-up",
        default=0,
        type=whole(0),
        is_common=True,
        on_resume="may change",
    ),
    Flag(
        "--lr-schedule",
        "after the warm-up",
        default="linear",
        choices=("linear", "cosine", "constant"),
        on_resume="may change",
    ),
    Flag("--min-lr", "where the schedule ends", default=0.0, type=real(), on_resume="may change"),
    Flag(
        "--optimizer",
        "adam is AdamW; 8bit-adam needs bitsandbytes",
        default="adam",
        choices=("adam", "8bit-adam"),
        is_common=True,
        on_resume="must match",
    ),
    Flag(
        "--weight-decay",
        "of matrices; biases and norms have none",
        default=0.01,
        type=real(at_most=MAX_RATE),
        on_resume="may change",
    ),
    Flag(
        "--max-grad-norm",
        "gradient norm to clip to; inf: never",
        default=1.0,
        type=real(positive=True, finite=False),
        on_resume="may change",
    ),
    Flag(
        "--seq-length",
        "tokens of a block",
        default=2048,
        type=whole(2),
        is_common=True,
        on_resume="must match",
    ),
    Flag(
        "--batch-size",
        "sequences per pipeline and iteration",
        default=8,
        type=whole(1),
        is_common=True,
        on_resume="may change",
    ),
    Flag(
        "--micro-batch-size",
        "sequences per microbatch",
        default=1,
        type=whole(1),
        is_common=True,
        on_resume="must match",
    ),
    Flag(
        "--gradient-accumulate-step",
        "iterations per update",
        default=1,
        type=whole(1),
        is_common=True,
        on_resume="must match",
    ),
    Flag(
        "--seed",
        "of data order, dropout and random weights",
        default=42,
        type=whole(0),
        on_resume="must match",
    ),
    Flag("--train-warmup-steps", "accepted from old scripts; does nothing", type=whole(0)),
)
