"""The tables that `pipeline.py` prints; the implementations in a table are its contenders."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.ours import Ours
from benchmarks.peer import TorchDataParallel, TorchPipeline
from benchmarks.work import Contender, Workload
from comm.process_groups import ProcessGroups
from comm.topology import Topology
from modules.matmul.backend import Matmul, choose_matmul
from modules.matmul.cpu_info import CpuInfo
from modules.registry import MODELS
from pipeline_parallel.partition.balance import balanced_split
from pipeline_parallel.schedule.schedules import SCHEDULES

WORK = Workload()


@dataclass(frozen=True)
class ContenderSpec:
    """An entry of a table: its name, and `make`, which builds the `Contender` of one process.

    matmul: the matmul backend while the contender runs; None: the backend of the command line.
    """

    name: str
    make: Callable[[Topology, ProcessGroups], Contender]
    matmul: Matmul | None = None


@dataclass(frozen=True)
class Case:
    """The definition of a table of results; `shape` is (stages, replicas).

    `ratios`: pairs of contenders, by name; the table shows the ratio of their speeds.
    """

    name: str
    title: str
    work: Workload
    entries: list[ContenderSpec]
    ratios: list[tuple[str, str]]
    shape: tuple[int, int] = (2, 1)


def auto(work: Workload) -> Workload:
    """Returns the same workload with the split that `--num-layers auto` chooses."""
    weights = MODELS["gptneox"].load().sizes(work.config).work(work.tokens)
    split = balanced_split(weights, num_stages=len(work.split), model_layers=work.layers)
    return work.on(split=tuple(split))


def ours(work: Workload, pp_mode: str, *, traced: bool = True) -> ContenderSpec:
    name = f"{pp_mode} {'-'.join(map(str, work.split))}{'' if traced else ' untraced'}"
    return ContenderSpec(
        name, lambda topology, groups: Ours(work, pp_mode, topology, groups, traced=traced)
    )


def theirs(work: Workload, schedule: str, *, fused: bool = True) -> ContenderSpec:
    name = f"torch {schedule} {'-'.join(map(str, work.split))}"
    return ContenderSpec(
        name, lambda topology, groups: TorchPipeline(work, schedule, topology, fused=fused)
    )


def _fp32() -> Case:
    best = auto(WORK)
    other = WORK.on(split=(5, 3))
    return Case(
        "fp32",
        "fp32, 8 microbatches",
        WORK,
        [
            *(ours(work, mode) for work in (WORK, best) for mode in SCHEDULES),
            *(theirs(work, name) for work in (WORK, other) for name in ("GPipe", "1F1B")),
        ],
        [
            ("gpipe 4-4", "torch GPipe 4-4"),
            ("zb-h1 5-3", "torch GPipe 4-4"),
            ("zb-h1 5-3", "torch 1F1B 4-4"),
            ("zb-h1 5-3", "torch GPipe 5-3"),
            ("zb-h1 5-3", "torch 1F1B 5-3"),
            ("1f1b 4-4", "gpipe 4-4"),
            ("zb-h1 4-4", "gpipe 4-4"),
            ("zb-h1 4-4", "1f1b 4-4"),
            ("zb-h1 5-3", "gpipe 5-3"),
            ("zb-h1 5-3", "1f1b 5-3"),
        ],
    )


def _data_parallel() -> Case:
    work = WORK.on(split=(8,))
    name = "torch DDP"
    return Case(
        "data",
        "fp32, two replicas of one stage, 8 microbatches each",
        work,
        [
            ours(work, "1f1b"),
            ContenderSpec(name, lambda topology, _: TorchDataParallel(work, topology, fused=True)),
        ],
        [("1f1b 8", name)],
        shape=(1, 2),
    )


def _gpipes(name: str, title: str, work: Workload) -> Case:
    return Case(
        name,
        title,
        work,
        [ours(work, "gpipe"), theirs(work, "GPipe")],
        [("gpipe 4-4", "torch GPipe 4-4")],
    )


def _short(batch: int) -> Case:
    work = WORK.on(batch=batch)
    return Case(
        f"m{batch}",
        f"fp32, {batch} microbatches",
        work,
        [
            ours(auto(work), "zb-h1"),
            *(ours(work, mode) for mode in SCHEDULES),
            theirs(work, "GPipe"),
            theirs(work.on(split=(5, 3)), "GPipe"),
        ],
        [("zb-h1 5-3", "torch GPipe 4-4"), ("zb-h1 5-3", "torch GPipe 5-3")],
    )


def _many() -> Case:
    work = WORK.on(batch=32)
    return Case(
        "m32",
        "fp32, 32 microbatches",
        work,
        [
            *(ours(work, mode) for mode in SCHEDULES),
            *(theirs(work, name) for name in ("GPipe", "1F1B")),
        ],
        [("zb-h1 4-4", "torch 1F1B 4-4")],
    )


def _defaults() -> Case:
    """Builds the case in which our side and torch's use their default matmul backends and AdamW."""
    matmul = choose_matmul(CpuInfo.of_this_machine())
    mine = replace(ours(WORK, "gpipe"), matmul=matmul)
    other = replace(theirs(WORK, "GPipe", fused=False), matmul="default")
    return Case(
        "defaults",
        f"fp32, 8 microbatches, each side with its defaults (ours multiplies with {matmul})",
        WORK,
        [mine, other],
        [(mine.name, other.name)],
    )


def _profiling() -> Case:
    return Case(
        "profiling",
        "fp32, 8 microbatches, without and with --profiling",
        WORK,
        [ours(WORK, "zb-h1", traced=False), ours(WORK, "zb-h1")],
        [("zb-h1 4-4 untraced", "zb-h1 4-4")],
    )


def _all() -> list[Case]:
    return [
        _fp32(),
        _defaults(),
        _data_parallel(),
        _gpipes("recompute", "fp32, recomputed activations", WORK.on(recompute="full")),
        _gpipes("bf16", "bf16 compute copies of fp32 masters", WORK.on(precision="bf16")),
        _short(4),
        _short(2),
        _many(),
        _profiling(),
    ]


CASES = {case.name: case for case in _all()}
