"""Check 3: NCCL's communicators on one GPU, and training over them beside training over gloo.

On a CPU: the same checks of communicators and the same runs over gloo, beside one process.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.gpu.report import CheckReport, Options, run_check
from tests.gpu.worlds import (
    Clock,
    World,
    expect_losses,
    expecting,
    finish,
    metric,
    run_worlds,
    start_inputs,
)
from tests.support.launcher import free_port, run_ranks

BACKENDS = ("gloo", "cupy_nccl", "nccl")  # gloo is the reference of the others
SCHEDULES = ("gpipe", "1f1b", "zb-h1")
QUICK_SCHEDULES = ("1f1b",)
WITHIN = 1e-5  # relative, in fp32: replicas and one process add gradients in different orders


def check(report: CheckReport, options: Options) -> None:
    clock = Clock(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = start_inputs(folder, options)
        _check_communicators(report, options, clock)
        finish(inputs, within=clock.share(2))
        if options.is_cuda:
            _train_over_nccl(report, folder, options, clock)
        else:
            report.measure("NCCL", "none", note="it needs a GPU; gloo takes its place here")
            _train_over_gloo(report, folder, options, clock)


def _check_communicators(report: CheckReport, options: Options, clock: Clock) -> None:
    backends = BACKENDS if options.is_cuda else BACKENDS[:1]
    if options.is_cuda:
        with expecting(report, "CuPy's NCCL: a communicator of one"):
            (version,) = run_ranks(1, all_reduce_alone, options, deadline=clock.share(3))
            report.measure("NCCL of CuPy", version)
    for backend in backends:
        with expecting(report, f"a group of two over {backend}"):
            urls = {name: f"tcp://127.0.0.1:{free_port()}" for name in ("stages", "replicas")}
            run_ranks(2, communicate, urls, backend, options, deadline=clock.share(3))


def all_reduce_alone(rank: int, _world_size: int, _url: str, options: Options) -> str:
    from tests.gpu.groups import check_alone  # imports torch, which only ranks need

    return check_alone(rank, options)


def communicate(
    rank: int, _world_size: int, _url: str, urls: Mapping[str, str], backend: str, options: Options
) -> None:
    from tests.gpu.groups import check_backend

    check_backend(rank, urls, backend, options)


def _train_over_nccl(report: CheckReport, folder: Path, options: Options, clock: Clock) -> None:
    """Trains over gloo and both NCCL backends; expects the same bits.

    Each message is copied, and a sum of two replicas has one rounding, so no backend may change a
    bit. Attention in fp32 runs torch's memory-efficient kernel; sequences this short are one block
    of keys, so its backward needs no atomic additions, whose order would change bits.
    """
    worlds = {backend: worlds_over(backend) for backend in BACKENDS}
    for number, (backend, of_backend) in enumerate(worlds.items()):
        later = len(worlds) - number - 1
        chains = [[world] for world in of_backend]
        outcomes = run_worlds(chains, folder, options, clock, later=later)
        for world, reference in zip(of_backend, worlds["gloo"], strict=True):
            expect_losses(
                report,
                f"training, {world.name}",
                outcomes[world.name],
                metric(folder, world),
                metric(folder, reference),
                tolerance=0.0,
                note="the reference" if backend == "gloo" else "same bits as over gloo",
            )


def _train_over_gloo(report: CheckReport, folder: Path, options: Options, clock: Clock) -> None:
    """Trains over gloo beside one process.

    On a CPU the bits do not depend on the number of stages. Two replicas add the gradients of the
    same microbatches in another order.
    """
    alone = World("one process")
    worlds = worlds_over("gloo", QUICK_SCHEDULES if options.quick else SCHEDULES)
    chains = [[world] for world in (alone, *worlds)]
    outcomes = run_worlds(chains, folder, options, clock)
    for world in worlds:
        expect_losses(
            report,
            f"training, {world.name}",
            outcomes[world.name],
            metric(folder, world),
            metric(folder, alone),
            tolerance=0.0 if world.replicas == 1 else WITHIN,
            note="one process: " + ("same bits" if world.replicas == 1 else "to 1e-5"),
        )


def worlds_over(backend: str, schedules: Sequence[str] = SCHEDULES) -> list[World]:
    """Returns runs of two ranks: two stages with each schedule, and two replicas with ZeRO."""
    stages = [
        World(f"{backend} {schedule}", stages=2, flags=f"--pp-mode {schedule}", backend=backend)
        for schedule in schedules
    ]
    return [*stages, World(f"{backend} replicas", 1, 2, "--zero-stage 1", backend)]


if __name__ == "__main__":
    run_check(check)
