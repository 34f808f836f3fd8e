"""Tests --plan: its numbers, its output, and how it decides whether the memory is enough."""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import planning.memory.dry_run
from arguments.train import parse_train
from arguments.values import size as parsed_size
from dist_clm_train import main
from modules.layers.rotary import rotation
from modules.registry import MODELS
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.dry_run import DryRun, PlannedModel
from planning.memory.stage_memory import StageMemory
from tests.support.cases import to_argv
from tests.support.flags import flags_of

Capture = pytest.CaptureFixture[str]

HIDDEN, TOKENS, ROWS, MANY_ROWS = 64, 32, 4, 8
SIZES = {"vocab_size": 512, "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
CONFIG = GPTNeoXConfig(**SIZES)


@pytest.fixture(autouse=True)
def _allocator_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder that contains only config.json."""
    folder = tmp_path_factory.mktemp("plan")
    CONFIG.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    """Restores the variables for GPUs, which the program sets."""
    with patch.dict(os.environ):
        yield


def argv(folder: Path, **changes: Any) -> list[str]:
    right = f"""--model-name {folder} --model-type gptneox --num-layers auto --total-steps 1
        --embedding-dim {HIDDEN} --seq-length {TOKENS} --batch-size {ROWS}
        --task-name no_such_file.jsonl --checkpoint-path {folder}/none --recompute true"""
    flags = {**flags_of(right), **{name.replace("_", "-"): v for name, v in changes.items()}}
    flags["world-size"] = flags.get("pipeline-group-size", 1) * flags.get("data-group-size", 1)
    return to_argv(flags)


def rehearse(folder: Path, rank: int, *, cuda: bool = False, **changes: Any) -> StageMemory:
    args = parse_train(argv(folder, **changes), {})
    family, stages = MODELS["gptneox"].load(), args.parallel.pipeline_group_size
    sizes = family.sizes(CONFIG)
    split = StageSplit(args.model.num_layers, sizes, num_stages=stages, seq_len=TOKENS)
    return DryRun(args, PlannedModel(family, CONFIG, split.layers), cuda=cuda).of_rank(rank)


BYTES: list[tuple[dict[str, Any], int, int]] = [
    ({}, 16, 0),
    ({"bf16": True}, 18, 0),
    ({"fp16": True, "optimizer": "8bit-adam"}, 12, 0),
    ({"bf16": True, "use_offload": True}, 6, 12),
    ({"bf16": True, "data_group_size": 2, "zero_stage": 1}, 12, 0),
]


@pytest.mark.parametrize(
    ("changes", "device", "on_host", "cuda"),
    [(*BYTES[0], False), *((*case, True) for case in BYTES)],
)
def test_bytes_of_a_parameter_are_those_of_the_readme(
    changes: dict[str, Any], device: float, on_host: float, cuda: bool, folder: Path
) -> None:
    """The planned bytes per parameter are those of docs/explanation/memory.md, within 4%.

    They differ slightly: in ZeRO stage 1, one replica keeps all masters and moments of a weight, so
    the replicas' shares are unequal; 8bit-adam keeps the moments of small weights in fp32; and
    offload needs two buffers as large as the largest weight.
    """
    found = rehearse(folder, 0, cuda=cuda, batch_size=1, **changes)
    count = sum(p.numel() for p in GPTNeoXForCausalLM(CONFIG).parameters())
    assert found.parameters == count
    assert found.weights == (2 if "bf16" in changes or "fp16" in changes else 4) * count
    kept = (found.weights + found.gradients + found.optimizer) / count
    if cuda:
        buffers = 2 * 4 * 512 * HIDDEN if on_host else 0
        assert kept == pytest.approx(device, rel=0.04)
        assert (found.host - buffers) / count == pytest.approx(on_host, rel=0.04)
    else:
        assert kept == pytest.approx(device + on_host, rel=0.04)


def pinned(size: int) -> int:
    """Returns the pinned host memory for `size` bytes: `size` rounded up to a power of two."""
    return 1 << (size - 1).bit_length()


@pytest.mark.parametrize("cuda", [False, True])
def test_the_copy_that_is_saved_is_in_host_memory(cuda: bool, folder: Path) -> None:
    """With --async-checkpoint, replica 0 has a copy of weights, masters and moments on the host."""
    counts = [p.numel() for p in GPTNeoXForCausalLM(CONFIG).parameters()]
    flags: dict[str, Any] = {"bf16": True, "data_group_size": 2, "batch_size": 1}
    for rank, size in ((0, 14), (1, 0)):
        found = rehearse(folder, rank, cuda=cuda, async_checkpoint=True, **flags)
        plain = rehearse(folder, rank, cuda=cuda, **flags)
        added = size * found.parameters
        if cuda and rank == 0:
            added = sum(pinned(2 * n) + 3 * pinned(4 * n) for n in counts)
        assert (found.host, found.copied) == ((added, 0) if cuda else (0, added))
        assert found.peak == plain.peak + found.copied
        assert found.activations == plain.activations


def test_offloaded_state_counts_as_torch_allocates_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masters and two buffers for gradients are pinned; moments and copies of both are not.

    The plan left out the rounding of pinned tensors, up to half of their memory. But for the copy
    of --async-checkpoint it rounded the copies of tensors in host memory, which are not pinned.
    """
    counts = [p.numel() for p in GPTNeoXForCausalLM(CONFIG).parameters()]
    flags: dict[str, Any] = {"bf16": True, "use_offload": True, "async_checkpoint": True}
    options = "expandable_segments:True,pinned_max_round_threshold_mb:0"
    for value, size in (("", pinned), (options, int)):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", value)
        found = rehearse(folder, 0, cuda=True, batch_size=1, **flags)
        masters, buffers = sum(size(4 * n) for n in counts), 2 * size(4 * max(counts))
        assert found.offloaded == masters + 8 * sum(counts) + buffers
        assert found.host_copy == sum(size(2 * n) + 12 * n for n in counts)
        assert found.host == found.offloaded + found.host_copy
        assert (found.optimizer, found.copied) == (0, 0)


@pytest.mark.parametrize(
    ("mode", "recompute", "stage"),
    [("gpipe", "false", 0), ("1f1b", "selective", 0), ("zb-h1", "true", 1)],
)
def test_a_few_microbatches_tell_of_many(
    mode: str, recompute: str, stage: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run of a few microbatches plans the memory of all of them, within a few bytes."""
    flags: dict[str, Any] = {"pp_mode": mode, "recompute": recompute, "pipeline_group_size": 2}
    found = rehearse(folder, stage, batch_size=MANY_ROWS, **flags)
    monkeypatch.setattr(planning.memory.dry_run, "ENOUGH", MANY_ROWS)
    whole = rehearse(folder, stage, batch_size=MANY_ROWS, **flags)
    assert abs(whole.peak - found.peak) <= 4 * MANY_ROWS
    assert replace(found, peak=whole.peak) == whole


def test_on_gpus_scores_are_never_held(folder: Path) -> None:
    """GPUs keep no attention scores, so half the rows of twice the length need the same memory."""
    flags: dict[str, Any] = {"recompute": "false", "bf16": True, "pp_mode": "1f1b"}
    short = rehearse(folder, 0, cuda=True, seq_length=32, micro_batch_size=4, **flags)
    long = rehearse(folder, 0, cuda=True, seq_length=64, micro_batch_size=2, **flags)
    assert long.activations == pytest.approx(short.activations, rel=0.02)


def test_nothing_of_a_rehearsal_stays(folder: Path) -> None:
    rehearse(folder, 0, batch_size=1)
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    table = rotation(TOKENS, HIDDEN // 16, 10_000.0, pairs=False, **options)
    assert not isinstance(table.cos, FakeTensor)


def plan(folder: Path, capsys: Capture, **changes: Any) -> tuple[int, list[str]]:
    """Runs --plan; returns the exit status and the printed lines."""
    try:
        main([*argv(folder, **changes), "--plan"])
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, capsys.readouterr().out.splitlines()


def test_what_is_printed(folder: Path, capsys: Capture) -> None:
    status, lines = plan(folder, capsys, pipeline_group_size=2, data_group_size=2)
    assert status == 0
    assert lines[0].startswith("gptneox, 2 stages x 2 pipelines on CPUs, fp32, adam; gpipe of 4 ")
    block = 12 * HIDDEN**2 + 13 * HIDDEN
    embedding, head = 512 * HIDDEN, 512 * HIDDEN + 2 * HIDDEN
    for line, extra in ((lines[2], embedding), (lines[3], head)):
        cells = re.split(r"  +", line.strip())
        millions = (block + extra) / 1e6
        assert cells[1:3] == ["1", f"{millions:.1f} M"]
        assert cells[3] == cells[4] == in_units(4 * millions)
        assert cells[5] == in_units(8 * millions)
        assert cells[8:] == [str(ROWS), in_units(12 * millions)]
    words = "\n".join(lines)
    boundary = 4 * ROWS * TOKENS * HIDDEN / 1e3
    assert f"stage 0 to 1: {boundary:.1f} kB an iteration, and as much back\n" in words
    assert f"each replica of stage 0: {in_units(4 * (block + embedding) / 1e6)} an" in words
    assert f"rank 0 to the others: {3 * 8 * ROWS * TOKENS / 1e3:.1f} kB of tokens" in words
    assert re.search(r"expected bubble \d+\.\d%$", words)


def in_units(millions: float) -> str:
    return f"{millions:.1f} MB" if millions >= 1 else f"{1000 * millions:.1f} kB"


def test_what_does_not_fit_is_told_with_what_helps(folder: Path, capsys: Capture) -> None:
    """The peak printed for each advised change is right; the change that saves most comes first."""
    flags: dict[str, Any] = {"recompute": "false", "micro_batch_size": 2}
    peak = rehearse(folder, 0, **flags).peak
    assert plan(folder, capsys, **flags, device_memory=f"{peak}B")[0] == 0
    limit = peak - 1
    status, lines = plan(folder, capsys, **flags, device_memory=f"{limit}B")
    assert status == 1
    start = next(i for i, line in enumerate(lines) if line.startswith("stage 0 needs"))
    found = [
        re.fullmatch(r"  (--.+): (\S+ .B) less, (\S+ .B) at the peak, which fits", line)
        for line in lines[start + 1 :]
    ]
    assert all(found)
    assert len(found) >= 4
    saved = [parsed_size(one[2].replace(" ", "")) for one in found if one]
    assert saved == sorted(saved, reverse=True)
    changes: dict[str, dict[str, Any]] = {
        "--recompute true": {"recompute": "true"},
        "--recompute selective": {"recompute": "selective"},
        "--pp-mode 1f1b": {"pp_mode": "1f1b"},
        "--micro-batch-size 1": {"micro_batch_size": 1},
    }
    by_flag = {one[1]: one[3] for one in found if one}
    for flag, change in changes.items():
        own = rehearse(folder, 0, **{**flags, **change}).peak
        assert by_flag[flag] == in_units(own / 1e6)


def test_the_advice_to_offload_names_the_host_memory(folder: Path, capsys: Capture) -> None:
    """The host memory is that of a plan with --use-offload; other changes need none."""
    _, lines = plan(folder, capsys, use_cuda=True, bf16=True, device_memory="1kB")
    host = rehearse(folder, 0, cuda=True, bf16=True, use_offload=True).host
    found = [line for line in lines if "of host memory" in line]
    assert [line.split(":")[0].strip() for line in found] == ["--use-offload"]
    assert found[0].endswith(f" at the peak, {in_units(host / 1e6)} of host memory")


def test_what_no_checkpoint_goes_on_with_is_told_so(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "2").mkdir()
    flags: dict[str, Any] = {"micro_batch_size": 2, "recompute": "false", "seq_length": 64}
    _, lines = plan(folder, capsys, **flags, device_memory="1kB", checkpoint_path=tmp_path)
    told = {line.split(":")[0].strip(): line for line in lines if line.startswith("  --")}
    anew = {flag for flag, line in told.items() if line.endswith(" at the peak (a new run only)")}
    assert anew == {"--micro-batch-size 1", "--optimizer 8bit-adam", "--bf16"}
    assert {"--recompute true", "--pp-mode 1f1b"} < told.keys()


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def plan_to(output: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> int:
    """Runs --plan with `output` as its standard output; returns the exit status.

    If main leaves text in the file's buffer, closing the file raises an error, and the test fails.
    """
    with os.fdopen(output, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        try:
            main([*argv(folder, **changes), "--plan"])
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


@pytest.mark.parametrize(("memory", "status"), [("1GB", 0), ("1kB", 1)])
def test_who_stops_reading_still_learns_whether_it_fits(
    memory: str, status: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    options = {"device_memory": memory, "batch_size": 1}
    assert plan_to(closed_pipe(), folder, monkeypatch, **options) == status
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_no_plan_that_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert plan_to(os.open("/dev/full", os.O_WRONLY), folder, monkeypatch) == 2
    assert capsys.readouterr().err == "standard output: No space left on device\n"


def test_the_other_ranks_print_nothing(folder: Path, capsys: Capture) -> None:
    assert plan(folder, capsys, pipeline_group_size=2, rank=1) == (0, [])


@pytest.mark.parametrize("size", ["24", "0GB", "-1GB", "24 g", "GB"])
def test_a_size_without_its_unit_is_refused(size: str, folder: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*argv(folder), "--plan", f"--device-memory={size}"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("--device-memory: expected a size above 0")


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29)])
def test_sizes(text: str, size: int, folder: Path) -> None:
    assert parse_train([*argv(folder), "--device-memory", text], {}).output.device_memory == size


def test_auto_chooses_the_fastest_that_fits(folder: Path, capsys: Capture) -> None:
    """The table has the peak of the fullest stage for each mode; the plan is that of the choice."""
    flags: dict[str, Any] = {"pipeline_group_size": 2}
    peaks = {
        mode: [rehearse(folder, stage, recompute=mode, **flags).peak for stage in range(2)]
        for mode in ("false", "selective", "true")
    }
    chosen, limit = "selective", max(peaks["selective"])
    status, lines = plan(folder, capsys, recompute="auto", device_memory=f"{limit}B", **flags)
    assert status == 0
    assert lines[0].endswith(" tokens; recompute auto")
    stage = peaks[chosen].index(max(peaks[chosen]))
    for line, mode in zip(lines[2:5], peaks, strict=True):
        cells = re.split(r"  +", line.strip())
        fits = "yes" if max(peaks[mode]) <= limit else "NO"
        assert cells == [mode, str(stage), in_units(peaks[mode][stage] / 1e6), fits]
    assert lines[5].startswith(f"recompute: {chosen}, because ")
    planned = [re.split(r"  +", line.strip()) for line in lines[7:9]]
    assert [row[7] for row in planned] == [in_units(peak / 1e6) for peak in peaks[chosen]]


def test_auto_without_a_known_memory_plans_the_fastest(folder: Path, capsys: Capture) -> None:
    """On a machine without a GPU, a plan for GPUs knows no memory."""
    _, lines = plan(folder, capsys, recompute="auto", use_cuda=True, batch_size=1)
    assert lines[1].split("  ")[-1].strip() == "peak"
    assert lines[5].startswith("recompute: false, because only --device-memory SIZE ")
    peak = rehearse(folder, 0, cuda=True, recompute="false", batch_size=1).peak
    assert re.split(r"  +", lines[7].strip())[7] == in_units(peak / 1e6)


def test_auto_on_cpus_uses_the_memory_of_this_machine(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planning.memory.device_memory.machine_memory", lambda: 8 * 10**9)
    flags: dict[str, Any] = {"pipeline_group_size": 2, "batch_size": 1}
    _, lines = plan(folder, capsys, recompute="auto", **flags)
    assert lines[1].endswith("  fits 2.9 GB")
    assert lines[5].startswith("recompute: false, because stage ")
    assert lines[5].endswith(" of 2.9 GB (this machine's memory for tensors of each of 2 ranks)")
