"""Tests the error line of every rank when memory runs out."""

import re
import resource
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from comm.topology import Topology
from common.tensors import HostMemoryError
from modules.families.gptneox import GPTNeoXBlock
from pipeline_parallel.engine import Engine
from planning.memory.out_of_memory import (
    NEXT_STEP,
    NEXT_STEP_ON_HOST,
    explain_out_of_memory,
)
from planning.memory.stage_memory import StageMemory
from tests.support.cases import Case, Told, meet_at, to_argv, train_cases
from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.flags import flags_of
from tests.support.launcher import free_port, run_ranks
from tests.support.models import make_hf
from tests.support.runs import fork_ranks

HIDDEN, LAYERS = 128, 2
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3 GiB."
CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes."


@dataclass(frozen=True)
class Bounded:
    """A hook that limits a rank's address space when training begins, so activations do not fit."""

    rank: int

    def arm(self) -> None:
        train = Engine.train

        def bounded(engine: Engine, *args: Any, **options: Any) -> Any:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 150_000_000, -1))
            return train(engine, *args, **options)

        setattr(Engine, "train", bounded)  # noqa: B010


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shortage")
    sizes = {"vocab_size": 512, "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN}
    model = make_hf("gptneox", num_hidden_layers=LAYERS, max_position_embeddings=256, **sizes)
    model.config.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1))
    return folder


def flags(folder: Path) -> dict[str, Any]:
    return flags_of(f"""
        --model-name {folder}/model --load-pretrained-model false --model-type gptneox
        --num-layers auto --embedding-dim {HIDDEN} --task-name {folder}/a.jsonl --seq-length 64
        --total-steps 1 --recompute false --data-workers 0 --batch-size 4
    """)


@dataclass(frozen=True)
class Failing:
    """A hook that makes each call of `target` raise `error`."""

    target: str
    error: Exception

    def __call__(self, topology: Topology) -> AbstractContextManager[object]:
        return patch(self.target, side_effect=self.error)


@dataclass(frozen=True)
class FailingBlock:
    """A hook that lets `number` forwards of blocks succeed; the next forward runs out of memory."""

    number: int

    def __call__(self, topology: Topology) -> AbstractContextManager[object]:
        calls, forward = iter(range(1000)), GPTNeoXBlock.forward

        def run(block: GPTNeoXBlock, *given: Any) -> Any:
            if next(calls) == self.number:
                raise torch.OutOfMemoryError(CUDA)
            return forward(block, *given)

        return patch.object(GPTNeoXBlock, "forward", run)


third_microbatch = FailingBlock(2 * LAYERS + 1)  # in its second block


@contextmanager
def even_for_the_plan(topology: Topology) -> Iterator[None]:
    error = RuntimeError(CPU)
    rehearsal = patch("planning.memory.out_of_memory.DryRun", side_effect=error)
    with third_microbatch(topology), rehearsal:
        yield


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Told]:
    own = flags(folder)
    saving = own | {"total-steps": 2, "checkpoint-steps": 1}
    moments = Failing("training.build.build_optimizer", RuntimeError(CPU))
    cases = [
        Case("weights", own, Failing("training.build.StageModel", MemoryError()), stops=True),
        Case("moments", own, moments, stops=True),
        Case("microbatch", saving, FailingBlock((4 + 2) * LAYERS + 1), stops=True),
        Case("tight", own, even_for_the_plan, stops=True),
    ]
    (told,) = run_ranks(1, train_cases, meet_at([(1, 1)]), cases, folder, deadline=120.0)
    return told


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("weights", "stage 0, making the weights: out of memory; according to --plan"),
        (
            "moments",
            "stage 0, making gradients, masters and moments: out of memory (requested 512 "
            "bytes); according to --plan",
        ),
        (
            "microbatch",
            "stage 0, forward of microbatch 2, with 2 others in flight; last received: (1, 64) "
            "torch.int64: out of memory (requested 2.00 GiB); according to --plan",
        ),
    ],
)
def test_the_line_says_where_and_what_is_held(name: str, start: str, told: dict[str, Told]) -> None:
    line = told[f"{name}-1-1"].stopped
    assert line is not None
    assert line.startswith(start)
    assert "activations and temporary tensors (4 microbatches)" in line
    parameters = LAYERS * (12 * HIDDEN**2 + 13 * HIDDEN) + 2 * 512 * HIDDEN + 2 * HIDDEN
    for share, of in ((4, "weights"), (4, "gradients"), (8, "masters and moments")):
        assert f" {share * parameters / 1e6:.1f} MB of {of}" in line  # all are fp32
    assert line.endswith(f"; {NEXT_STEP}")


def test_without_memory_for_the_plan_the_command_is_still_named(told: dict[str, Told]) -> None:
    line = told["tight-1-1"].stopped
    assert line is not None
    assert line.endswith(f"(requested 2.00 GiB); {NEXT_STEP}")


def test_what_failed_is_let_go_of_before_the_plan() -> None:
    def work() -> None:
        held = torch.zeros(10)
        seen.append(weakref.ref(held))
        raise MemoryError

    def rehearse(*_: object, **__: object) -> None:
        assert seen[0]() is None
        raise MemoryError

    seen: list[weakref.ref[torch.Tensor]] = []
    nothing: Any = None
    try:
        work()
    except MemoryError as error:
        with patch("planning.memory.out_of_memory.DryRun", rehearse):
            explained = explain_out_of_memory("here", error, nothing, nothing, rank=0, cuda=False)
    assert explained == f"here: out of memory; {NEXT_STEP}"


def explain(
    error: Exception, *, offloaded: int, host_copy: int, cuda: bool = True, recompute: str = "true"
) -> str:
    """Returns the line about `error` in a run whose plan has these bytes in host memory."""
    planned = StageMemory(
        parameters=10, weights=1, gradients=2, optimizer=3, offloaded=offloaded,
        host_copy=host_copy, copied=0, peak=10, held=1, checkpoint=0,
    )  # fmt: skip
    settings: Any = SimpleNamespace(precision=SimpleNamespace(recompute=recompute))
    model: Any = None
    module = "planning.memory.out_of_memory"
    with patch(f"{module}.DryRun") as dry_run, patch(f"{module}.gc.collect"):
        dry_run.return_value.of_rank.return_value = planned
        return explain_out_of_memory("here", error, settings, model, rank=0, cuda=cuda)


@pytest.mark.parametrize(("recompute", "advised"), [("true", 0), ("false", 1), ("selective", 1)])
def test_the_line_names_the_mode_that_needs_less(recompute: str, advised: int) -> None:
    """--recompute auto may have chosen the mode, so that --plan alone would say that it fits."""
    error = MemoryError()
    line = explain(error, offloaded=0, host_copy=0, cuda=False, recompute=recompute)
    assert line.count("; --recompute true needs less; ") == advised
    assert line.endswith(NEXT_STEP)


def test_beside_a_gpu_a_lack_of_host_memory_gets_advice_for_the_host() -> None:
    """The advice was for the GPU, where the memory was enough; --use-offload needs even more."""
    error = HostMemoryError("tried to allocate 2.1 GB of pinned host memory")
    error.__cause__ = RuntimeError("CUDA error: out of memory")
    assert explain(error, offloaded=12 * 10**9, host_copy=6 * 10**9) == (
        "here: out of host memory (requested 2.1 GB); according to --plan, this rank keeps 12.0 GB "
        f"for --use-offload and 6.0 GB for --async-checkpoint in host memory; {NEXT_STEP_ON_HOST}"
    )
    assert "this rank keeps 6.0 GB for --async-checkpoint in" in explain(
        MemoryError(), offloaded=0, host_copy=6 * 10**9
    )
    assert "keeps no state in host memory" in explain(MemoryError(), offloaded=0, host_copy=0)
    on_cpu = explain(MemoryError(), offloaded=0, host_copy=0, cuda=False)
    assert on_cpu.startswith("here: out of memory; according to --plan, this rank holds 1 bytes")


def test_the_status_of_a_cuda_library_is_quoted() -> None:
    """A fault of another kind can end in this status, too."""
    text = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    line = explain(RuntimeError(text), offloaded=5, host_copy=0)
    assert line.startswith("here: out of memory (CUBLAS_STATUS_NOT_INITIALIZED); according to")
    assert line.endswith(NEXT_STEP)


def test_memory_that_truly_runs_out_ends_every_rank(folder: Path) -> None:
    """If memory runs out on rank 1, both ranks say so in one line and exit with status 1."""
    own = flags(folder) | flags_of(f"""
        --batch-size 120 --seq-length 256 --pipeline-group-size 2 --world-size 2
        --dist-url tcp://127.0.0.1:{free_port()} --checkpoint-path {folder}/bounded
    """)
    argvs = [to_argv(own | {"rank": rank}) for rank in range(2)]
    outcome = fork_ranks(argvs, folder, hooks=[Bounded(1)])
    assert outcome.statuses == [1, 1]
    first, second = outcome.lines
    assert len(first) == len(second) == 1
    assert first[0] == f"rank 0: {second[0]}"
    assert re.match(
        r"rank 1: stage 1, forward of microbatch \d+, with \d+ others in flight; last received: "
        r"\(1, 256, 128\) torch.float32: out of memory \(requested \d+ bytes\); according to "
        r"--plan, .*; the same command with --rank 0 --plan --device-memory SIZE",
        second[0],
    )
