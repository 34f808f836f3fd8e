"""Flags of checkpoints, logs and reports."""

from __future__ import annotations

from pathlib import Path

from arguments.flag import Flag
from arguments.values import MAX_SECONDS, real, switch, whole

CHECKPOINT_FLAGS = (
    Flag(
        "--checkpoint-path",
        "default: model_checkpoints/<model folder's name>",
        type=Path,
        is_common=True,
        across_ranks="own",
    ),
    Flag(
        "--checkpoint-steps",
        "save every so many iterations; 0: only at the end",
        default=0,
        type=whole(0),
        is_common=True,
        on_resume="may change",
    ),
    Flag(
        "--load-checkpoint",
        "resume from --checkpoint-path if it has a checkpoint",
        default=True,
        type=switch,
    ),
    Flag(
        "--keep-checkpoints",
        "keep only the newest N, once a newer one is complete; default: all",
        type=whole(1),
        metavar="N",
        on_resume="may change",
    ),
    Flag(
        "--keep-optimizer-states",
        "only the newest N checkpoints keep their optimizer state; older ones can be converted, "
        "but training cannot resume from them; default: all",
        type=whole(1),
        metavar="N",
        on_resume="may change",
    ),
    Flag(
        "--async-checkpoint",
        "training stops only while its state is copied to host memory; the copy is written beside "
        "training",
        default=False,
        type=switch,
        on_resume="may change",
    ),
    Flag(
        "--checkpoint-failure",
        "when a save fails, of a full disk for example: warn, and training goes on, or end the "
        "run; a failure of the last save always ends it",
        default="warn",
        choices=("warn", "fatal"),
        on_resume="may change",
    ),
    Flag(
        "--grace-seconds",
        "seconds after SIGTERM, SIGINT or SIGUSR1 for the update to end and be saved, before exit "
        "status 75; later, 1",
        default=300.0,
        type=real(positive=True, at_most=MAX_SECONDS),
        on_resume="may change",
    ),
)

OUTPUT_FLAGS = (
    Flag(
        "--check-cluster",
        "meet, compare the machines, measure devices and links, print what to expect, and end; "
        "reads no weights and no data",
        default=False,
        type=switch,
        is_common=True,
    ),
    Flag(
        "--project-name",
        "Weights & Biases project",
        default="dist-clm-train",
        on_resume="may change",
        across_ranks="own",
    ),
    Flag(
        "--profiling",
        "tidy_profiling: a trace of every rank, and timeline.png of one step of all, in trace_json "
        "under the working directory",
        default="no-profiling",
        choices=("no-profiling", "tidy_profiling"),
    ),
)
