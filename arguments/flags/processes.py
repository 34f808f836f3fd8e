"""Flags of the processes, their devices and their network."""

from __future__ import annotations

from pathlib import Path

from arguments.flag import Flag
from arguments.values import MAX_SECONDS, real, switch, whole
from data_parallel.modes import DP_MODES
from pipeline_parallel.schedule.schedules import SCHEDULES

PARALLEL_FLAGS = (
    Flag("--world-size", "number of processes; default: 1", type=whole(1), is_common=True),
    Flag(
        "--rank",
        "number of this process; default: 0",
        type=whole(0),
        is_common=True,
        across_ranks="own",
    ),
    Flag(
        "--pipeline-group-size",
        "stages of a pipeline",
        default=1,
        type=whole(1),
        is_common=True,
    ),
    Flag(
        "--data-group-size",
        "pipelines (data-parallel replicas)",
        default=1,
        type=whole(1),
        is_common=True,
        on_resume="may change",
    ),
    Flag(
        "--pp-mode",
        "pipeline schedule",
        default="gpipe",
        choices=tuple(SCHEDULES),
        is_common=True,
        on_resume="may change",
    ),
    Flag(
        "--dp-mode",
        "how replicas stay one model",
        default="allreduce",
        choices=tuple(DP_MODES),
        on_resume="must match",
    ),
    Flag(
        "--zero-stage",
        "1: each replica keeps its share of master weights and moments",
        default=0,
        type=int,
        choices=(0, 1),
        on_resume="may change",
    ),
    Flag(
        "--cuda-id",
        "GPU of this process; default: 0",
        type=whole(0),
        is_common=True,
        across_ranks="own",
    ),
    Flag("--use-cuda", "default: true where there is a GPU", type=switch, across_ranks="own"),
    Flag(
        "--dist-backend",
        "activations and gradients between stages; nccl is torch's own, without CuPy; default: "
        "cupy_nccl, on CPU gloo",
        choices=("cupy_nccl", "nccl", "gloo"),
        on_resume="may change",
    ),
    Flag(
        "--dp-backend",
        "gradients between replicas; nccl is torch's own where --dist-backend is nccl, else "
        "CuPy's; default: nccl, on CPU gloo",
        choices=("nccl", "gloo"),
        on_resume="may change",
    ),
)

NETWORK_FLAGS = (
    Flag(
        "--dist-url",
        "where rank 0 listens; default: tcp://127.0.0.1:7033",
        is_common=True,
        across_ranks="own",
    ),
    Flag(
        "--net-interface",
        "network interface; default: the one that leads to rank 0",
        is_common=True,
        on_resume="may change",
        across_ranks="own",
    ),
    Flag(
        "--job-id",
        "tells this job from others at the same --dist-url",
        default="0",
        across_ranks="proven",
    ),
    Flag(
        "--job-token-file",
        "file with a secret that only this job's ranks have, each on its own disk; without it, "
        "everyone who knows --job-id can join",
        type=Path,
        across_ranks="proven",
    ),
    Flag(
        "--join-timeout",
        "seconds for all ranks to meet",
        default=300.0,
        type=real(positive=True, at_most=MAX_SECONDS),
        on_resume="may change",
    ),
    Flag(
        "--dist-timeout",
        "seconds that one operation may wait for a peer, at least 5",
        default=300.0,
        type=real(positive=True, at_most=MAX_SECONDS),
        on_resume="may change",
    ),
)
