"""Flags of checkpoints, logs and reports."""

from pathlib import Path

from arguments.flag import free, unkept
from arguments.values import MAX_SECONDS, real, switch, whole

CHECKPOINT_FLAGS = (
    unkept(
        "--checkpoint-path",
        "folder of the checkpoints; default: model_checkpoints/<model folder's name>",
        None,
        Path,
        common=True,
        ranks="own",
    ),
    free(
        "--checkpoint-steps",
        "iterations between saves; 0: save only at the end",
        0,
        whole(0),
        common=True,
    ),
    unkept(
        "--load-checkpoint", "resume from --checkpoint-path if it has a checkpoint", True, switch
    ),
    free(
        "--keep-checkpoints",
        "keep only the newest N checkpoints, and delete older ones after a save; default: keep all",
        None,
        whole(1),
        metavar="N",
    ),
    free(
        "--keep-optimizer-states",
        "only the newest N checkpoints keep their optimizer state; older checkpoints can be "
        "converted, but training cannot resume from them; default: all",
        None,
        whole(1),
        metavar="N",
    ),
    free(
        "--async-checkpoint",
        "training pauses only while its state is copied to host memory; the copy is written to "
        "disk during training",
        False,
        switch,
    ),
    free(
        "--checkpoint-failure",
        "if a save fails, for example because a disk is full: warn logs a warning and training "
        "continues; fatal ends the run; a failure of the last save always ends the run",
        "warn",
        choices=("warn", "fatal"),
    ),
    free(
        "--grace-seconds",
        "seconds after SIGTERM, SIGINT or SIGUSR1 in which the update must end and be saved; exit "
        "status 75 if it is saved in time, else 1",
        300.0,
        real(positive=True, at_most=MAX_SECONDS),
    ),
)

OUTPUT_FLAGS = (
    unkept(
        "--check-cluster",
        "compare the machines of all ranks, measure devices and links, print expected times and "
        "remedies, then exit; reads no weights and no data",
        False,
        switch,
        common=True,
    ),
    free("--project-name", "Weights & Biases project", "dist-clm-train", ranks="own"),
    unkept(
        "--profiling",
        "tidy_profiling: write a trace of every rank, and timeline.png of one step of all ranks, "
        "to trace_json under the working directory",
        "no-profiling",
        choices=("no-profiling", "tidy_profiling"),
    ),
)
