"""Check 5: the memory that --plan predicts beside the peak of a run, and the traces of a run."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu.report import CheckReport, Options, run_check
from tests.gpu.traces import trace_problems
from tests.gpu.worlds import (
    MODEL,
    STEPS,
    Clock,
    ModelConfig,
    World,
    finish,
    reason,
    run_worlds,
    start_inputs,
    succeeded,
)
from tests.support.measured_memory import PLAN_WITHIN, planned_ratios
from tests.support.runs import Outcome


class Shape(NamedTuple):
    """A run whose memory is measured."""

    name: str
    family: str
    stages: int
    flags: str
    quick: bool = False


class Size(NamedTuple):
    """The size of the models on a device, and the tokens of a sequence."""

    width: int
    vocabulary: int
    layers: int
    tokens: int


SHAPES = (
    Shape("gptj fp32 recompute", "gptj", 1, "--recompute true"),
    Shape("gptj bf16 offload", "gptj", 1, "--bf16 --use-offload", quick=True),
    Shape("gptneox fp32 selective", "gptneox", 1, "--recompute selective"),
    Shape("gptneox bf16 recompute", "gptneox", 1, "--bf16 --recompute true"),
    Shape("gptneox P=2 zb-h1", "gptneox", 2, "--pp-mode zb-h1", quick=True),
    Shape(
        "gptneox P=2 bf16 1f1b recompute", "gptneox", 2, "--bf16 --pp-mode 1f1b --recompute true"
    ),
)
# On a GPU the models are large beside the small buffers that a plan does not count.
SIZES = {"cpu": Size(128, 2048, 2, 64), "cuda": Size(1024, 32_000, 4, 1024)}
# torch takes the workspaces of cuBLAS from its own allocator, 32 MiB each on an H100, and a plan
# does not count them. cuBLAS also runs with these small ones.
SMALL_WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "128"}
TRACE = World("trace", stages=2, flags="--pp-mode 1f1b --profiling tidy_profiling")
SLACK = {"cpu": 0.01, "cuda": 500.0}  # us; the times of a GPU are converted to the host's clock


def check(report: CheckReport, options: Options) -> None:
    clock, size = Clock(options), SIZES[options.device]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"model": ("gptneox", MODEL), **configs(size)}
        inputs = start_inputs(folder, options, models, imports=["torch._dynamo"])
        finish(inputs, within=clock.share(2))
        shapes = [shape for shape in SHAPES if shape.quick or not options.quick]
        chains = [[_world(shape, folder, size)] for shape in shapes]
        outcomes = run_worlds([*chains, [TRACE]], folder, options, clock)
        for shape in shapes:
            _expect_planned(report, shape, outcomes[shape.name])
        _expect_trace(report, folder, options, outcomes[TRACE.name])


def configs(size: Size) -> dict[str, ModelConfig]:
    """Returns the config of a model of each family; a head has a sixteenth of a block's width."""
    gptneox: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 8,
        "intermediate_size": 4 * size.width,
        "max_position_embeddings": size.tokens,
    }
    gptj: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "n_embd": size.width,
        "n_layer": size.layers,
        "n_head": 8,
        "n_positions": size.tokens,
        "rotary_dim": size.width // 16,
    }
    return {"gptneox": ("gptneox", gptneox), "gptj": ("gptj", gptj)}


def _world(shape: Shape, folder: Path, size: Size) -> World:
    flags = f"""
        --measure-memory --model-name {folder}/{shape.family} --model-type {shape.family}
        --embedding-dim {size.width} --seq-length {size.tokens} --total-steps 2 {shape.flags}
    """
    return World(shape.name, shape.stages, flags=flags, environ=SMALL_WORKSPACES)


def _expect_planned(report: CheckReport, shape: Shape, outcome: Outcome) -> None:
    """Adds a row: plan / measurement of every rank; the value is the worst one."""
    name = f"planned / measured memory, {shape.name}"
    ratios = planned_ratios(outcome.told[0])
    if not succeeded(outcome):
        report.expect(name, False, note=reason(outcome))
        return
    if len(ratios) != shape.stages:
        report.expect(name, False, note=f"{len(ratios)} log lines of {shape.stages} ranks")
        return
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    report.expect(name, abs(worst - 1) <= PLAN_WITHIN, worst, "", f"within {PLAN_WITHIN:.0%}")


def _expect_trace(report: CheckReport, folder: Path, options: Options, outcome: Outcome) -> None:
    name = "the traces of --profiling tidy_profiling are valid"
    if not succeeded(outcome):
        report.expect(name, False, note=reason(outcome))
        return
    traces = folder / TRACE.name / "trace_json"
    paths = [traces / f"disk_rank{rank}.json" for rank in range(TRACE.stages)]
    problems = trace_problems(paths, steps=STEPS, slack=SLACK[options.device])
    print(*problems, sep="\n", end="\n" * bool(problems))
    report.expect(name, not problems, float(len(problems)), "problems", "".join(problems[:1])[:300])


if __name__ == "__main__":
    run_check(check)
