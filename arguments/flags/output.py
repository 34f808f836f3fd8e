"""Flags of checkpoints, logs and reports."""

from pathlib import Path

from arguments.flag import free, unkept
from arguments.values import MAX_SECONDS, real, switch, whole

CHECKPOINT_FLAGS = (
    unkept(
        "--checkpoint-path",
        "default: model_checkpoints/<model folder's name>",
        None,
        Path,
        common=True,
        ranks="own",
    ),
    free(
        "--checkpoint-steps",
        "save every so many iterations; 0: only at the end",
        0,
        whole(0),
        common=True,
    ),
    unkept(
        "--load-checkpoint", "resume from --checkpoint-path if it has a checkpoint", True, switch
    ),
    free(
        "--keep-checkpoints",
        "keep only the newest N, once a newer one is complete; default: all",
        None,
        whole(1),
        metavar="N",
    ),
    free(
        "--keep-optimizer-states",
        "only the newest N checkpoints keep their optimizer state; older ones can be converted, "
        "but training cannot resume from them; default: all",
        None,
        whole(1),
        metavar="N",
    ),
    free(
        "--async-checkpoint",
        "training stops only while its state is copied to host memory; the copy is written beside "
        "training",
        False,
        switch,
    ),
    free(
        "--checkpoint-failure",
        "when a save fails, of a full disk for example: warn, and training goes on, or end the "
        "run; a failure of the last save always ends it",
        "warn",
        choices=("warn", "fatal"),
    ),
    free(
        "--grace-seconds",
        "seconds after SIGTERM, SIGINT or SIGUSR1 for the update to end and be saved, before exit "
        "status 75; later, 1",
        300.0,
        real(positive=True, at_most=MAX_SECONDS),
    ),
)

OUTPUT_FLAGS = (
    unkept(
        "--check-cluster",
        "meet, compare the machines, measure devices and links, print what to expect, and end; "
        "reads no weights and no data",
        False,
        switch,
        common=True,
    ),
    free("--project-name", "Weights & Biases project", "dist-clm-train", ranks="own"),
    unkept(
        "--profiling",
        "tidy_profiling: a trace of every rank, and timeline.png of one step of all, in trace_json "
        "under the working directory",
        "no-profiling",
        choices=("no-profiling", "tidy_profiling"),
    ),
)
