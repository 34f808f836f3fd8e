"""Tests training of weights from Hugging Face and predecessors, and conversion of the results."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from monitor.metrics import read_metrics
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.cases import to_argv
from tests.support.checkpoint_models import hf_weights, to_hf
from tests.support.data import WORDS, make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.launcher import free_port
from tests.support.models import make_shards
from tests.support.predecessors import CONFIGS, buffers, expected_hf, make_checkpoint, make_modules
from tests.support.runs import Outcome, Rank, Run, run_all

ROOT = Path(__file__).parents[2]
Outcomes = dict[str, Outcome]  # by run
FAMILIES = ("gptneox", "gptj")
LAYERS = 7
# Family, number of stages, --num-layers, and the folder that is converted back.
ROADS = [
    ("gptneox", 1, "auto", "run/1"),
    ("gptneox", 2, "4", "run"),
    ("gptj", 4, "1,3,1,2", "run/1"),
]
TOKENS, ROWS = 24, 2
TOLERANCE = 1e-5  # relative, of a loss in fp32


def run_of(name: str, folder: Path, stages: int, flags: str) -> Run:
    """Returns a run of one pipeline whose ranks work in `folder`."""
    common = flags_of(f"""
        --task-name data.jsonl --seq-length {TOKENS} --batch-size {ROWS} --data-workers 0
        --checkpoint-path run --world-size {stages} --pipeline-group-size {stages}
        --dist-url tcp://127.0.0.1:{free_port()} {flags}
    """)
    argvs = [to_argv({**common, "rank": rank}) for rank in range(stages)]
    return Run(name, [Rank(argv, folder) for argv in argvs])


def road(base: Path, family: str, stages: int, num_layers: str) -> Run:
    """Returns a run that trains a converted model for one iteration at learning rate 0."""
    folder = base / f"road-{family}-{stages}"
    folder.mkdir()
    shutil.copy(base / "data.jsonl", folder)
    flags = f"""
        --model-name {base}/shards/{family} --model-type {family} --num-layers {num_layers}
        --embedding-dim 32 --total-steps 1 --lr 0
    """
    return run_of(folder.name, folder, stages, flags)


def small_tokenizer() -> Any:
    """Builds a tokenizer of a few whole words, which fit predecessors' vocabulary of 53 tokens."""
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


def old_shards(family: str, folder: Path) -> None:
    """Writes layer shards as predecessors did: fp16 weights, attention masks and rotary tables."""
    folder.mkdir(parents=True)
    small_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    first, *blocks, last = make_modules(family)
    torch.save(first, folder / "pytorch_embs.pt")
    for index, block in enumerate(blocks):
        torch.save({**block, **buffers(family)}, folder / f"pytorch_{index}.pt")
    torch.save(last, folder / "pytorch_lm_head.pt")


def old_flags(family: str) -> str:
    return (
        f"--model-name m --model-type {family} --num-layers 2 --embedding-dim 16 --total-steps 2 "
        "--lr 1e-4"
    )


def from_old_shards(base: Path, family: str) -> Run:
    folder = base / f"old-shards-{family}"
    old_shards(family, folder / "m")
    shutil.copy(base / "data.jsonl", folder)
    return run_of(folder.name, folder, 2, old_flags(family))


def from_old_checkpoint(base: Path, family: str) -> list[Run]:
    """Returns a run from a predecessor's checkpoint, and a run that resumes the first run.

    The layer shards are deleted, so both runs must read their weights from checkpoints.
    """
    folder = base / f"old-checkpoint-{family}"
    old_shards(family, folder / "m")
    for path in (folder / "m").glob("pytorch_*.pt"):
        path.unlink()
    make_checkpoint(family, folder / "run" / "checkpoint_20")
    (folder / "run" / "latest").write_text("20")
    shutil.copy(base / "data.jsonl", folder)
    flags = old_flags(family)
    return [
        run_of(f"{folder.name}-1", folder, 2, flags),
        run_of(f"{folder.name}-2", folder, 2, f"{flags} --total-steps 4"),
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with hf/<family>, shards/<family> and data.jsonl."""
    folder = tmp_path_factory.mktemp("road")
    for family, layers in (("gptneox", "num_hidden_layers"), ("gptj", "n_layer")):
        make_shards(folder, family, family, {layers: LAYERS})
    write_jsonl(folder / "data.jsonl", make_texts(60, seed=1))
    return folder


@pytest.fixture(scope="module")
def ended(base: Path) -> Outcomes:
    """Returns the outcomes of all runs; every rank must have exit status 0 and an empty stderr."""
    chains = [[road(base, family, stages, num_layers)] for family, stages, num_layers, _ in ROADS]
    chains += [[from_old_shards(base, family)] for family in FAMILIES]
    chains += [from_old_checkpoint(base, family) for family in FAMILIES]
    outcomes = run_all(chains, at_once=2)
    for name, ranks in outcomes.items():
        for outcome in ranks:
            assert (outcome.status, outcome.stderr) == (0, ""), (name, outcome)
    return outcomes


def load(folder: Path) -> Any:
    """Loads converted files with transformers; no key may be missing or unexpected."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[problem]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(3))
    result: Tensor = model(tokens).logits
    return result


@pytest.mark.parametrize(("family", "stages", "num_layers", "place"), ROADS)
def test_an_iteration_at_rate_0_changes_no_bit(
    family: str,
    stages: int,
    num_layers: str,
    place: str,
    base: Path,
    tmp_path: Path,
    ended: Outcomes,
) -> None:
    to_hf(base / f"road-{family}-{stages}" / place, tmp_path / "back", family, verify=True)
    model = load(tmp_path / "back")
    before, after = hf_weights(base / "hf" / family), hf_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(model), logits(load(base / "hf" / family)))
    (line,) = read_metrics(base / f"road-{family}-{stages}" / "run" / "metrics.jsonl")
    assert line["grad_norm"] > 0.0


def test_the_split_is_told_once(ended: Outcomes) -> None:
    """Only rank 0 logs the split, with each stage's share of the multiply-adds.

    A block has 32 x (4 x 32 + 2 x 128 + 25) multiply-adds per token, and the head has 32 x 400.
    """
    told = [rank.stdout.splitlines() for rank in ended["road-gptj-4"]]
    lines = [line for rank in told for line in rank if "layers of the stages" in line]
    assert lines == [
        "layers of the stages: 1,3,1,2; shares of the multiply-adds: 12.5%, 37.6%, 12.5%, 37.3%; "
        "the slowest stage has 50.4% more than the mean; gpipe of 2 microbatches: expected bubble "
        "65.7%"
    ]
    assert lines[0] in told[0]


def old_hf(family: str, folder: Path) -> Any:
    """Loads the predecessors' weights in fp32 into transformers' own model."""
    folder.mkdir()
    weights = {
        key: value.float() for key, value in expected_hf(family, make_modules(family)).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    return load(folder)


@torch.no_grad()
def first_loss(model: Any, data: Path) -> float:
    """Returns the model's loss on the blocks of the first iteration."""
    sources = [SourceSpec(str(data))]
    stream = open_training_stream(sources, small_tokenizer(), seq_len=TOKENS, seed=42)
    blocks = islice((stream.next_block().token_ids for _ in iter(int, 1)), ROWS)
    tokens = torch.from_numpy(np.stack(list(blocks)))
    return float(model(tokens, labels=tokens).loss.item())


@pytest.mark.parametrize("run", ["old-shards", "old-checkpoint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_with_predecessors_weights(
    family: str, run: str, base: Path, tmp_path: Path, ended: Outcomes
) -> None:
    lines = read_metrics(base / f"{run}-{family}" / "run" / "metrics.jsonl")
    expected = first_loss(old_hf(family, tmp_path / "hf"), base / "data.jsonl")
    assert lines[0]["step"] == 1
    assert lines[0]["loss"] == pytest.approx(expected, rel=TOLERANCE)
    assert lines[1]["loss"] != lines[0]["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_predecessors_checkpoint_starts_a_run_of_its_own(
    family: str, base: Path, ended: Outcomes
) -> None:
    """A predecessor's weights start a run at step 0; the next start resumes this run at step 2."""
    run = base / f"old-checkpoint-{family}" / "run"
    told = ended[f"old-checkpoint-{family}-1"][0].stdout.splitlines()
    (line,) = [line for line in told if "checkpoint_20" in line]
    assert all(word in line for word in ("only the weights", "step 0", "new optimizer state")), line
    assert ended[f"old-checkpoint-{family}-1"][1].stdout == ""
    first, second = (base / f"old-{kind}-{family}" / "run" for kind in ("shards", "checkpoint"))
    losses = [line["loss"] for line in read_metrics(second / "metrics.jsonl")]
    assert [line["loss"] for line in read_metrics(first / "metrics.jsonl")] == losses[:2]

    told = ended[f"old-checkpoint-{family}-2"][0].stdout.splitlines()
    assert any("resumed from step 2" in line for line in told)
    assert not any("checkpoint_20" in line for line in told)
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["resumed"]
    assert (run / "latest").read_text() == "4"
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"2", "4", "checkpoint_20"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_came_of_predecessors_files_converts(
    family: str, base: Path, tmp_path: Path, ended: Outcomes
) -> None:
    """Conversion keeps a predecessor's weights; training changes them, but only slightly."""
    folder = base / f"old-checkpoint-{family}"
    expected = expected_hf(family, make_modules(family))
    to_hf(folder / "run", tmp_path / "new", family, verify=True)
    load(tmp_path / "new")
    new = hf_weights(tmp_path / "new")
    assert new.keys() == expected.keys()
    differences = [float((new[key] - expected[key].float()).abs().max()) for key in expected]
    assert 0.0 < max(differences) < 2e-3
    counts = {"n_stages": 2, "n_layer_per_stage": 2, "config_name": str(folder / "m")}
    to_hf(folder / "run" / "checkpoint_20", tmp_path / "old", family, verify=True, **counts)
    old = hf_weights(tmp_path / "old")
    assert all(torch.equal(old[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_torchrun(base: Path) -> None:
    """A run that torchrun starts takes rank, world size, address and device from torchrun.

    This slow test starts torchrun without --standalone; test_launchers starts it with the flag.
    """
    folder = base / "torchrun"
    folder.mkdir()
    shutil.copy(base / "data.jsonl", folder)
    flags = f"""
        --model-name {base}/shards/gptneox --model-type gptneox --num-layers 4 --embedding-dim 32
        --task-name data.jsonl --seq-length {TOKENS} --batch-size {ROWS} --data-workers 0
        --pipeline-group-size 2 --total-steps 2 --checkpoint-path run
    """
    launch = f"-m torch.distributed.run --master-port {free_port()} --nproc-per-node 2"
    done = subprocess.run(
        [sys.executable, *launch.split(), str(ROOT / "dist_clm_train.py"), *flags.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert (folder / "run" / "latest").read_text() == "2"
