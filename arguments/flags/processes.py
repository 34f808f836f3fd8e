"""Flags of the processes, their devices and their network."""

from pathlib import Path

from arguments.flag import fixed, free, unkept
from arguments.values import MAX_SECONDS, real, switch, whole
from data_parallel.modes import DP_MODES
from pipeline_parallel.schedule.schedules import SCHEDULES

PARALLEL_FLAGS = (
    unkept("--world-size", "number of processes; default: 1", None, whole(1), common=True),
    unkept(
        "--rank", "number of this process; default: 0", None, whole(0), common=True, ranks="own"
    ),
    unkept("--pipeline-group-size", "stages of a pipeline", 1, whole(1), common=True),
    free("--data-group-size", "pipelines (data-parallel replicas)", 1, whole(1), common=True),
    free("--pp-mode", "pipeline schedule", "gpipe", choices=tuple(SCHEDULES), common=True),
    fixed("--dp-mode", "how replicas stay one model", "allreduce", choices=tuple(DP_MODES)),
    free(
        "--zero-stage",
        "1: each replica keeps its share of master weights and moments",
        0,
        int,
        choices=(0, 1),
    ),
    unkept(
        "--cuda-id", "GPU of this process; default: 0", None, whole(0), common=True, ranks="own"
    ),
    unkept("--use-cuda", "default: true where there is a GPU", None, switch, ranks="own"),
    free(
        "--dist-backend",
        "activations and gradients between stages; nccl is torch's own, without CuPy; default: "
        "cupy_nccl, on CPU gloo",
        choices=("cupy_nccl", "nccl", "gloo"),
    ),
    free(
        "--dp-backend",
        "gradients between replicas; nccl is torch's own where --dist-backend is nccl, else "
        "CuPy's; default: nccl, on CPU gloo",
        choices=("nccl", "gloo"),
    ),
)

NETWORK_FLAGS = (
    unkept(
        "--dist-url",
        "where rank 0 listens; default: tcp://127.0.0.1:7033",
        common=True,
        ranks="own",
    ),
    free(
        "--net-interface",
        "network interface; default: the one that leads to rank 0",
        common=True,
        ranks="own",
    ),
    unkept("--job-id", "tells this job from others at the same --dist-url", "0", ranks="proven"),
    unkept(
        "--job-token-file",
        "file with a secret that only this job's ranks have, each on its own disk; without it, "
        "everyone who knows --job-id can join",
        None,
        Path,
        ranks="proven",
    ),
    free(
        "--join-timeout",
        "seconds for all ranks to meet",
        300.0,
        real(positive=True, at_most=MAX_SECONDS),
    ),
    free(
        "--dist-timeout",
        "seconds that one operation may wait for a peer, at least 5",
        300.0,
        real(positive=True, at_most=MAX_SECONDS),
    ),
)
