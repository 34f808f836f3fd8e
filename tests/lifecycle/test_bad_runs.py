"""Mistakes in files and flags: every rank ends with one line, the same, and exit status 2.

Each mistake is made in the smallest world in which it can be made, and some of each kind in a world
of four (WORLDS). What else is wrong with a file of weights, its reader's own tests have.
"""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.lock import lock_folder
from comm.timing import Timing
from tests.support.checkpoint_models import edit_json, reseal
from tests.support.data import tokenizer
from tests.support.flags import flags_of
from tests.support.hooks import no_picture
from tests.support.launcher import free_port
from tests.support.runs import Outcome, Rank, Run, run, run_all
from tests.support.valid_run import LAYERS, ROOT, VOCAB, argv, at, make_home, right, the_line

Outcomes = dict[str, Outcome]  # by run
QUICK = Timing(join_grace=1.0)
QKV, LAST = "attention.query_key_value.weight", "pytorch_2.pt"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid input, with a tokenizer of one token too many and a large weight."""
    home = make_home(tmp_path_factory.mktemp("bad-input"))
    tokenizer().save_pretrained(home / "longer")
    path = home / "longer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["unheard-of"] = VOCAB
    path.write_text(json.dumps(content))
    shutil.copytree(home / "m", home / "large")
    (home / "large" / "manifest.json").unlink()
    edit(home / "large" / LAST, lambda s: s[QKV][0].fill_(-1e5))
    return home


def test_a_command_with_a_wrong_flag(home: Path, tmp_path: Path) -> None:
    given = argv(right(home) | {"rank": 1, "lr": "fast"})
    (done,) = run(Run("user", [Rank(given, tmp_path, is_forked=False)]))
    assert done.status == 2
    assert the_line(done.stderr) == "--lr: expected a number of at least 0, got 'fast'"


def test_flags_are_refused_before_torch_is_imported() -> None:
    code = "import sys, dist_clm_train\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def break_json(path: Path) -> None:
    path.write_text("{")


class RunsCode:
    """A pickle of it makes a file where it is read."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch ran",))


def drop_end_of_text(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


Spoil = Callable[[Path], object]

# What is wrong with the model folder of one rank, and the words of the line.
FOLDERS: dict[str, tuple[int, Spoil, list[str]]] = {
    "shard missing": (3, lambda d: (d / LAST).unlink(), [LAST, "no such file"]),
    "a pickle that runs code": (
        0,
        lambda d: (d / LAST).write_bytes(pickle.dumps({"a": RunsCode()}, protocol=2)),
        [LAST, "refused", "posix.system"],
    ),
    "another shard than replica 0's": (
        1,
        lambda d: edit(d / LAST, lambda s: s[QKV][0].add_(1e-7)),
        ["--model-name", "stage 0", "not the same for all replicas"],
    ),
    "another config": (
        1,
        lambda d: edit_json(d / "config.json", layer_norm_eps=1e-6),
        ["--model-name", "config.json is not the same on rank 0 and rank 1"],
    ),
    "config of another width": (
        0,
        lambda d: edit_json(d / "config.json", hidden_size=64),
        ["--embedding-dim 32", "config.json", "64"],
    ),
    "config broken": (0, lambda d: break_json(d / "config.json"), ["--model-name", "config.json"]),
    "no tokenizer": (0, drop_tokenizer, ["--tokenizer-name", "no tokenizer files"]),
    "no end of text": (0, drop_end_of_text, ["--tokenizer-name", "eos_token"]),
}


def on_all(flags: str) -> dict[int, str]:
    return dict.fromkeys(range(4), flags)


# Flags of some ranks that differ from the right ones, and the words of the line.
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


def in_step(name: str, spoil: Spoil) -> Spoil:
    """What is wrong in a file of a checkpoint was saved so: its manifests have the sums of it."""

    def spoil_and_reseal(folder: Path) -> None:
        spoil(folder / "2" / name)
        reseal(folder / "2")

    return spoil_and_reseal


def fill_moment(path: Path) -> None:
    edit(path, lambda s: s["exp_avg"][f"1.{QKV}"].fill_(float("nan")))


def fill_weight(path: Path) -> None:
    edit(path, lambda s: s[f"1.{QKV}"].fill_(float("nan")))


def negate_last(folder: Path) -> None:
    edit(folder / "2" / "prank_1_checkpoint.pt", lambda s: s[f"0.{QKV}"].neg_())


# Flags of a second start on a checkpoint of the first, what is done to that, and the words of the
# line. The resume's own tests have the other flags.
RESUMES: dict[str, tuple[str, Spoil, list[str]]] = {
    "another seed": ("--seed 7", lambda d: None, ["--seed is 7", "made with 42"]),
    "no resume wanted": (
        "--load-checkpoint false",
        lambda d: None,
        ["--load-checkpoint false", "--checkpoint-path"],
    ),
    "optimizer with NaN": (
        "",
        in_step("prank_0_optimizer.pt", fill_moment),
        ["2/prank_0_optimizer.pt: exp_avg: 1.", QKV, "not finite"],
    ),
    "weights with NaN": (
        "",
        in_step("prank_0_checkpoint.pt", fill_weight),
        ["prank_0_checkpoint.pt", QKV, "not finite"],
    ),
    "meta broken": ("", in_step("meta.json", break_json), ["meta.json", "not readable"]),
    "config of the step broken": (
        "",
        in_step("config.json", break_json),
        ["2/config.json", "not readable"],
    ),
    "config of the step missing": (
        "",
        in_step("config.json", Path.unlink),
        ["2/config.json: no such file, but prank_0_manifest.json lists it"],
    ),
    "weights that are not as saved": (
        "",
        negate_last,
        ["2/prank_1_checkpoint.pt: damaged: ", "manifest.json says", "no complete checkpoint"],
    ),
}


# Where one rank alone cannot make a mistake, or four show that all end alike.
WORLDS = {
    "another shard than replica 0's": 2,
    "another config": 2,
    "shard missing": 4,
    "another lr": 4,
    "held-out data on rank 0 alone": 4,
    "rank twice": 4,
    "an interface that is not there": 4,
    "a bad line in the middle of training": 4,
    "another seed": 4,
    "weights that are not as saved": 4,
}
SHAPES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # stages and replicas
LATE = "another lr, seen before all are there"


def folder_of(home: Path, name: str) -> Path:
    return home / "work" / name.replace(" ", "-").replace("'", "")


def start(home: Path, name: str, changes: Mapping[int, str], size: int | None = None) -> Run:
    """A run whose working directory is its own."""
    folder, size = folder_of(home, name), size or WORLDS.get(name, 1)
    folder.mkdir(parents=True)
    stages, replicas = SHAPES[size]
    of_all = f"""
        --dist-url tcp://127.0.0.1:{free_port()} --checkpoint-path {folder}/checkpoints
        --world-size {size} --pipeline-group-size {stages} --data-group-size {replicas}
        --num-layers {2 if stages == 2 else LAYERS} --data-workers 0
    """
    ranks = []
    for rank in range(size):
        own = at(home, f"{of_all} --rank {rank} {changes.get(rank, '')}")
        given = argv(right(home) | flags_of(own))
        ranks.append(Rank(given, folder, hooks=[no_picture], timing=QUICK))
    return Run(name, ranks)


def first_runs(home: Path, busy: str) -> list[Run]:
    """A run for each mistake in FOLDERS and FLAGS, and those of a rank that is alone."""
    runs = [first_start(home, size) for size in (4, 1)]
    for name, (rank, spoil, _) in FOLDERS.items():
        # As it is published, without a manifest: what is wrong in it is seen for itself.
        model = shutil.copytree(home / "m", home / "copies" / folder_of(home, name).name)
        (model / "manifest.json").unlink()
        spoil(model)
        runs.append(start(home, name, {rank: f"--model-name {model}"}))
    runs += [start(home, name, changes) for name, (changes, _) in FLAGS.items()]
    late = start(home, LATE, {2: "--lr 0.5"}, size=4)
    runs.append(replace(late, ranks=[*late.ranks[:3], replace(late.ranks[3], late=1.5)]))
    for name, (flags, _) in ALONE.items():
        one = start(home, name, {0: flags.format(busy=busy)}, size=4)
        runs.append(replace(one, ranks=one.ranks[:1]))
    return runs


def first_start(home: Path, size: int) -> Run:
    """Nothing is wrong; it takes over the lock of a process that is dead."""
    one = start(home, f"{FIRST} {size}", {}, size)
    made = folder_of(home, one.name) / "checkpoints"
    made.mkdir()
    (made / ".lock").write_text("process 4194305 on a-machine-that-was")
    return one


def second_run(home: Path, name: str) -> Run:
    """A start with a mistake of RESUMES on what a first start has left."""
    flags, spoil, _ = RESUMES[name]
    one = start(home, name, on_all(f"--total-steps 4 {flags}"))
    made = folder_of(home, name) / "checkpoints"
    shutil.copytree(folder_of(home, f"{FIRST} {len(one.ranks)}") / "checkpoints", made)
    spoil(made)
    return one


# Flags of one rank of four, and the words of its line; another program listens at {busy}.
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
FIRST = "a first start of"


@pytest.fixture(scope="module")
def ended(home: Path) -> Outcomes:
    """The ends of all runs by name."""
    with lock_folder(home / "locked"), socket.create_server(("127.0.0.1", 0)) as busy:
        runs = first_runs(home, f"tcp://127.0.0.1:{busy.getsockname()[1]}")
        ends = run_all([[one] for one in runs], at_once=4)
    return ends | run_all([[second_run(home, name)] for name in RESUMES], at_once=4)


def test_the_first_start_is_right(ended: Outcomes) -> None:
    for size in (4, 1):
        outcome = ended[f"{FIRST} {size}"]
        assert outcome.statuses == [0] * size
        assert outcome.lines == [[]] * size


def the_same_line(outcomes: Outcome) -> str:
    """The line that every rank ends with, apart from the names of who says it and who saw it."""
    lines = []
    for rank, outcome in enumerate(outcomes):
        assert outcome.status == 2, outcome
        line = the_line(outcome.stderr).removeprefix(f"rank {rank}: ")
        line = re.sub(r"^rank [0-9]: ", "", line)
        lines.append(re.sub(r"--model-name \S+", "--model-name", line))  # may be each rank's own
        assert "Traceback" not in outcome.stdout
    assert len(set(lines)) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_folder(name: str, home: Path, ended: Outcomes) -> None:
    line, (rank, _, words) = the_same_line(ended[name]), FOLDERS[name]
    assert all(word in line for word in words), line
    if name == "shard missing":  # which one rank sees
        assert f"rank {rank}: " in ended[name][0].stderr, "the others name the rank that saw it"
    assert not (folder_of(home, name) / "ran").exists()


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_some_ranks(name: str, home: Path, ended: Outcomes) -> None:
    line = the_same_line(ended[name])
    assert all(at(home, word) in line for word in FLAGS[name][1]), line
    if "middle" in name:
        assert "step 1/200" in ended[name][0].stdout


def test_a_late_rank_hears_of_it_too(ended: Outcomes) -> None:
    assert "--lr must be the same on all ranks" in the_same_line(ended[LATE])


@pytest.mark.parametrize("name", RESUMES)
def test_a_second_start(name: str, ended: Outcomes) -> None:
    line = the_same_line(ended[name])
    assert all(word in line for word in RESUMES[name][2]), line


@pytest.mark.parametrize("name", ALONE)
def test_a_rank_alone(name: str, ended: Outcomes) -> None:
    (outcome,) = ended[name]
    assert outcome.status == 2, outcome
    assert all(word in the_line(outcome.stderr) for word in ALONE[name][1]), outcome.stderr
    assert outcome.seconds < 30.0
