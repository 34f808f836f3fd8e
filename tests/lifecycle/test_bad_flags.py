"""Tests that a mistake in flags gives the same error line and exit status 2 on every rank.

Each mistake has its own run. Most runs have one rank; WORLDS lists the mistakes whose runs have
more ranks. tests/cli/test_bad_input.py tests most mistakes in one process.
"""

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.lock import lock_folder
from tests.support.data import tokenizer
from tests.support.mistakes import Outcomes, on_all, start, the_same_line
from tests.support.runs import Rank, Run, run, run_all
from tests.support.valid_run import LAYERS, VOCAB, argv, at, make_home, right, the_line

QKV, LAST = "attention.query_key_value.weight", "pytorch_2.pt"
LATE = "another lr, seen before all are there"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes valid input, a tokenizer with too many tokens, and weights too large for fp16."""
    home = make_home(tmp_path_factory.mktemp("bad-flags"))
    tokenizer().save_pretrained(home / "longer")
    path = home / "longer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["unheard-of"] = VOCAB
    path.write_text(json.dumps(content))
    shutil.copytree(home / "m", home / "large")
    (home / "large" / "manifest.json").unlink()
    state = torch.load(home / "large" / LAST, weights_only=True)
    state[QKV][0].fill_(-1e5)
    torch.save(state, home / "large" / LAST)
    return home


def test_a_command_with_a_wrong_flag(home: Path, tmp_path: Path) -> None:
    given = argv(right(home) | {"rank": 1, "lr": "fast"})
    (done,) = run(Run("user", [Rank(given, tmp_path, is_forked=False)]))
    assert done.status == 2
    assert the_line(done.stderr) == "--lr: expected a number of at least 0, got 'fast'"


# Flags of some ranks that differ from the valid ones, and the words of the error line.
FLAGS: dict[str, tuple[dict[int, str], list[str]]] = {
    "another lr": (
        {2: "--lr 0.5"},
        ["--lr must be the same on all ranks", "1e-05 on rank 0", "0.5 on rank 2"],
    ),
    "held-out data on rank 0 alone": (
        {0: "--evaluation-data {home}/data.jsonl"},
        ["--evaluation-data must be the same on all ranks", "true on rank 0", "false on rank "],
    ),
    "no data on rank 0": (
        {0: "--task-name {home}/no.jsonl"},
        ["--task-name", "{home}/no.jsonl", "no such file"],
    ),
    "a bad line of data": (
        {0: "--task-name {home}/broken-at-once.jsonl"},
        ["{home}/broken-at-once.jsonl:1", "not JSON"],
    ),
    "a bad line in the middle of training": (
        on_all("--task-name {home}/broken.jsonl --seq-length 64 --batch-size 8 --total-steps 200"),
        ["{home}/broken.jsonl:4201", '"text"'],
    ),
    "a bad line of held-out data": (
        {0: "--evaluation-data {home}/data.jsonl,late={home}/broken-at-once.jsonl"},
        ["{home}/broken-at-once.jsonl:1", "not JSON"],
    ),
    "a GPU that is not there": (on_all("--use-cuda true"), ["--use-cuda true", "0 CUDA devices"]),
    "an interface that is not there": (
        {2: "--net-interface eth77"},
        ["--net-interface eth77", "no such interface", "lo"],
    ),
    "rank twice": ({3: "--rank 2"}, ["--rank 2", "two processes have it"]),
    "a file for a folder": (
        {0: "--checkpoint-path {home}/file"},
        ["--checkpoint-path", "{home}/file", "cannot be written"],
    ),
    "a tokenizer from nowhere": (
        {0: "--tokenizer-name no-such/tokenizer"},
        ["--tokenizer-name no-such/tokenizer", "expected a folder"],
    ),
    "a weight beyond fp16": (
        on_all("--fp16 --model-name {home}/large"),
        [LAST, QKV, "holds -100000, which does not fit fp16 (largest 65504): use --bf16"],
    ),
    "a longer tokenizer": (
        {0: "--tokenizer-name {home}/longer"},
        ["--tokenizer-name", "{home}/longer", "401", "vocabulary of 400"],
    ),
    "another run's checkpoints": (
        {0: "--checkpoint-path {home}/locked"},
        ["--checkpoint-path", "{home}/locked", f"in use by process {os.getpid()}"],
    ),
}


# Flags of one rank of four, and the words of its error line; another program listens at {busy}.
ALONE: dict[str, tuple[str, list[str]]] = {
    "a port in use": ("--dist-url {busy}", ["--dist-url", "in use on this machine"]),
    "a master that does not listen": (
        "--rank 1 --join-timeout 2",
        ["--dist-url", "no answer within 2 s (--join-timeout)"],
    ),
    "a master that another program is": (
        "--rank 1 --dist-url {busy} --join-timeout 2",
        ["--dist-url", "another program", "--join-timeout"],
    ),
    "a GPU that one process lacks": (
        "--cuda-id 5 --use-cuda true --world-size 1 --pipeline-group-size 1 --data-group-size 1 "
        f"--num-layers {LAYERS}",
        ["--use-cuda true", "0 CUDA devices"],
    ),
}
# Mistakes that need several ranks, and mistakes for which four ranks must end in the same way.
WORLDS = {
    "another lr": 4,
    "held-out data on rank 0 alone": 4,
    "rank twice": 4,
    "an interface that is not there": 4,
    "a bad line in the middle of training": 4,
}


def all_runs(home: Path, busy: str) -> list[Run]:
    """Returns a run for each mistake in FLAGS and ALONE, and a run whose last rank starts late."""
    runs = [start(home, name, changes, WORLDS.get(name, 1)) for name, (changes, _) in FLAGS.items()]
    late = start(home, LATE, {2: "--lr 0.5"}, size=4)
    runs.append(replace(late, ranks=[*late.ranks[:3], replace(late.ranks[3], late=1.5)]))
    for name, (flags, _) in ALONE.items():
        one = start(home, name, {0: flags.format(busy=busy)}, size=4)
        runs.append(replace(one, ranks=one.ranks[:1]))
    return runs


@pytest.fixture(scope="module")
def ended(home: Path) -> Outcomes:
    """Returns the outcomes of all runs by name."""
    with lock_folder(home / "locked"), socket.create_server(("127.0.0.1", 0)) as busy:
        runs = all_runs(home, f"tcp://127.0.0.1:{busy.getsockname()[1]}")
        return run_all([[one] for one in runs], at_once=4)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_some_ranks(name: str, home: Path, ended: Outcomes) -> None:
    line = the_same_line(ended[name])
    assert all(at(home, word) in line for word in FLAGS[name][1]), line
    if "middle" in name:
        assert "step 1/200" in ended[name][0].stdout


def test_a_late_rank_hears_of_it_too(ended: Outcomes) -> None:
    assert "--lr must be the same on all ranks" in the_same_line(ended[LATE])


@pytest.mark.parametrize("name", ALONE)
def test_a_rank_alone(name: str, ended: Outcomes) -> None:
    (outcome,) = ended[name]
    assert outcome.status == 2, outcome
    assert all(word in the_line(outcome.stderr) for word in ALONE[name][1]), outcome.stderr
    assert outcome.seconds < 30.0
