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
    fixed("--dp-mode", "how replicas keep the same weights", "allreduce", choices=tuple(DP_MODES)),
    free(
        "--zero-stage",
        "1: each replica keeps only its share of master weights and moments",
        0,
        int,
        choices=(0, 1),
    ),
    unkept(
        "--cuda-id", "GPU of this process; default: 0", None, whole(0), common=True, ranks="own"
    ),
    unkept(
        "--use-cuda", "train on a GPU; default: true if there is one", None, switch, ranks="own"
    ),
    free(
        "--dist-backend",
        "backend for activations and gradients between stages; nccl is torch's own, without CuPy; "
        "default: cupy_nccl on GPU, gloo on CPU",
        choices=("cupy_nccl", "nccl", "gloo"),
    ),
    free(
        "--dp-backend",
        "backend for gradients between replicas; nccl is torch's own if --dist-backend is nccl, "
        "else CuPy's; default: nccl on GPU, gloo on CPU",
        choices=("nccl", "gloo"),
    ),
)

NETWORK_FLAGS = (
    unkept(
        "--dist-url",
        "address on which rank 0 listens; default: tcp://127.0.0.1:7033",
        common=True,
        ranks="own",
    ),
    free(
        "--net-interface",
        "network interface; default: the interface of the route to rank 0",
        common=True,
        ranks="own",
    ),
    unkept(
        "--job-id",
        "name that distinguishes this job from other jobs at the same --dist-url",
        "0",
        ranks="proven",
    ),
    unkept(
        "--job-token-file",
        "file with a secret that only this job's ranks have; each rank reads it from its own disk; "
        "without the file, everyone who knows --job-id can join",
        None,
        Path,
        ranks="proven",
    ),
    free(
        "--join-timeout",
        "seconds in which all ranks must meet",
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
