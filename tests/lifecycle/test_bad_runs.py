"""Mistakes in files and flags: every rank ends with one line, the same, and exit status 2.

By default each mistake is made in the smallest world in which it can be made, and some of each kind
in a world of four (WORLDS); the slow form makes all of them in worlds of four.
"""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.lock import lock_folder
from comm.timing import Timing
from tests.support.checkpoint_models import reseal
from tests.support.data import tokenizer
from tests.support.hooks import no_picture
from tests.support.launcher import free_port
from tests.support.runs import Outcome, Rank, Run, run, run_all
from tests.support.valid_run import LAYERS, ROOT, VOCAB, Flags, argv, at, make_home, right, the_line


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


def commands(folder: Path, given: list[list[str]]) -> Outcome:
    """Runs ranks as a user starts them."""
    return run(Run("user", [Rank(argv, folder, is_forked=False) for argv in given]))


def test_a_command_with_a_wrong_flag(home: Path, tmp_path: Path) -> None:
    for done in commands(tmp_path, [argv(right(home) | {"rank": 1, "lr": "fast"})]):
        assert done.status == 2
        assert the_line(done.stderr) == "--lr: expected a number of at least 0, got 'fast'"


@pytest.mark.slow
def test_a_command_with_a_shard_that_one_rank_lacks(home: Path, tmp_path: Path) -> None:
    """Nothing but our line on stderr, of torch's C++ side either."""
    model = copy_of(home, "command")
    (model / "pytorch_lm_head.pt").unlink()
    flags = right(home) | {"dist-url": f"tcp://127.0.0.1:{free_port()}"}
    flags["checkpoint-path"] = home / "runs" / "command"
    ranks = [flags | {"rank": rank} for rank in range(4)]
    ranks[3]["model-name"] = model
    path = model / "pytorch_lm_head.pt"
    for rank, done in enumerate(commands(tmp_path, list(map(argv, ranks)))):
        assert done.status == 2
        assert the_line(done.stderr) == ("" if rank == 3 else f"rank {rank}: ") + (
            f"rank 3: {path}: no such file"
        )


def test_flags_are_refused_before_torch_is_imported() -> None:
    code = "import sys, dist_clm_train\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def copy_of(home: Path, name: str) -> Path:
    """A model as it is published, without a manifest: what is wrong in it is seen for itself."""
    copied = Path(shutil.copytree(home / "m", home / "copies" / name))
    (copied / "manifest.json").unlink()
    return copied


QUICK = Timing(join_grace=1.0)
QKV, LAST = "attention.query_key_value.weight", "pytorch_2.pt"  # of stage 1


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class RunsCode:
    """A pickle of it makes a file where it is read."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch ran",))


def spoil_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def negate_converted(path: Path) -> None:
    """A weight of another sign in a shard whose manifest knows better."""
    shutil.copy(path.parents[2] / "m" / "manifest.json", path.parent)
    edit(path, lambda state: state[QKV].neg_())


Spoil = Callable[[Path], object]

# What is wrong with the model folder of one rank, and the words of the line.
FOLDERS: dict[str, tuple[int, Spoil, list[str]]] = {
    "shard missing": (3, lambda d: (d / LAST).unlink(), [LAST, "no such file"]),
    "embedding missing": (2, lambda d: (d / "pytorch_embs.pt").unlink(), ["pytorch_embs.pt"]),
    "shard truncated": (1, lambda d: cut(d / LAST), [LAST, "bytes that are no complete"]),
    "key too many": (
        3, lambda d: edit(d / LAST, lambda s: s.update(a=torch.ones(1))), [LAST, "a unexpected"],
    ),
    "key missing": (3, lambda d: edit(d / LAST, lambda s: s.pop(QKV)), [LAST, QKV, "missing"]),
    "misshapen": (
        1,
        lambda d: edit(d / LAST, lambda s: s.update({QKV: torch.ones(4, 5)})),
        [LAST, QKV, "(4, 5)", "(96, 32)"],
    ),
    "not finite": (
        1, lambda d: edit(d / LAST, lambda s: s[QKV][0].fill_(float("nan"))),
        [LAST, QKV, "not finite"],
    ),
    "a pickle that runs code": (
        3,
        lambda d: (d / LAST).write_bytes(pickle.dumps({"a": RunsCode()}, protocol=2)),
        [LAST, "refused", "posix.system"],
    ),
    "a zip that runs code": (
        1, lambda d: torch.save({"a": RunsCode()}, d / LAST), [LAST, "refused", "posix.system"],
    ),
    "another shard than replica 0's": (
        3,
        lambda d: edit(d / LAST, lambda s: s[QKV][0].add_(1e-7)),
        ["--model-name", "stage {stage}", "not the same for all replicas"],
    ),
    "another shard than was converted": (
        3, lambda d: negate_converted(d / LAST),
        [LAST, "damaged: ", "remove manifest.json to load the folder unverified"],
    ),
    "another config": (
        3, lambda d: edit_config(d, layer_norm_eps=1e-6),
        ["--model-name", "config.json is not the same on rank 0 and rank {rank}"],
    ),
    "config of another width": (
        2, lambda d: edit_config(d, hidden_size=64), ["--embedding-dim 32", "config.json", "64"],
    ),
    "config broken": (1, lambda d: cut(d / "config.json"), ["--model-name", "config.json"]),
    "a rope scaling": (
        3,
        lambda d: edit_config(d, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        ["config.json", "rope", "'linear'", "not built"],
    ),
    "no tokenizer": (
        0, drop_tokenizer,
        ["--tokenizer-name", "no tokenizer files"],
    ),
    "no end of text": (
        0, lambda d: spoil_tokenizer(d, eos_token=None), ["--tokenizer-name", "eos_token"],
    ),
}  # fmt: skip


def on_all(flags: Flags) -> dict[int, Flags]:
    return dict.fromkeys(range(4), flags)


# Flags of some ranks that differ from the right ones, and the words of the line.
FLAGS: dict[str, tuple[dict[int, Flags], list[str]]] = {
    "another lr": (
        {2: {"lr": 0.5}},
        ["--lr must be the same on all ranks", "1e-05 on rank 0", "0.5 on rank 2"],
    ),
    "held-out data on rank 0 alone": (
        {0: {"evaluation-data": "{home}/data.jsonl"}},
        ["--evaluation-data must be the same on all ranks", "true on rank 0", "false on rank "],
    ),
    "no data on rank 0": (
        {0: {"task-name": "{home}/no.jsonl"}},
        ["--task-name", "{home}/no.jsonl", "no such file"],
    ),
    "a bad line of data": (
        {0: {"task-name": "{home}/broken-at-once.jsonl"}},
        ["{home}/broken-at-once.jsonl:1", "not JSON"],
    ),
    "a bad line in the middle of training": (
        on_all(
            {
                "task-name": "{home}/broken.jsonl", "seq-length": 64, "batch-size": 8,
                "total-steps": 200,
            },
        ),
        ["{home}/broken.jsonl:4201", '"text"'],
    ),
    "a bad line of held-out data": (  # of which the other ranks have nothing
        on_all({"evaluation-data": "x"})
        | {0: {"evaluation-data": "{home}/data.jsonl,late={home}/broken-at-once.jsonl"}},
        ["{home}/broken-at-once.jsonl:1", "not JSON"],
    ),
    "a GPU that is not there": (
        on_all({"use-cuda": "true"}), ["--use-cuda true", "0 CUDA devices"],
    ),
    "an interface that is not there": (
        {2: {"net-interface": "eth77"}}, ["--net-interface eth77", "no such interface", "lo"],
    ),
    "rank twice": ({3: {"rank": 2}}, ["--rank 2", "two processes have it"]),
    "a file for a folder": (
        {1: {"checkpoint-path": "{home}/file"}},
        ["--checkpoint-path", "{home}/file", "cannot be written"],
    ),
    "a tokenizer from nowhere": (
        {0: {"tokenizer-name": "no-such/tokenizer"}},
        ["--tokenizer-name no-such/tokenizer", "expected a folder"],
    ),
    "a weight beyond fp16": (
        on_all({"fp16": "true", "model-name": "{home}/large"}),
        [LAST, QKV, "holds -100000, which does not fit fp16 (largest 65504): use --bf16"],
    ),
    "a longer tokenizer": (
        {0: {"tokenizer-name": "{home}/longer"}},
        ["--tokenizer-name", "{home}/longer", "401", "vocabulary of 400"],
    ),
    "another run's checkpoints": (
        {0: {"checkpoint-path": "{home}/locked"}},
        ["--checkpoint-path", "{home}/locked", f"in use by process {os.getpid()}"],
    ),
}  # fmt: skip


def resealed(spoil: Spoil) -> Spoil:
    """What is wrong in a checkpoint was saved so: its manifests have the sums of it."""

    def spoil_and_reseal(folder: Path) -> None:
        spoil(folder)
        reseal(folder / "2")

    return spoil_and_reseal


def qkv(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the first layer's weight of that name in a stage's state."""
    return next(value for name, value in state.items() if name.endswith(QKV))


def of_last_stage(folder: Path, part: str) -> Path:
    return sorted((folder / "2").glob(f"prank_*_{part}.pt"))[-1]


# Flags of a second start on a checkpoint of the first, and the words of the line.
RESUMES: dict[str, tuple[Flags, list[str]]] = {
    "another seed": ({"seed": 7}, ["--seed is 7", "made with 42"]),
    "another batch": (
        {"batch-size": 4}, ["the global batch", "is {large batch}", "made with {batch}"],
    ),
    "other blocks": ({"seq-length": 16}, ["--seq-length is 16", "made with 24"]),
    "other data": ({"task-name": "{home}/broken.jsonl"}, ["--task-name is", "made with"]),
    "no resume wanted": (
        {"load-checkpoint": "false"}, ["--load-checkpoint false", "--checkpoint-path"],
    ),
}  # fmt: skip
STATES: dict[str, tuple[Spoil, list[str]]] = {
    "optimizer of nonsense": (
        resealed(lambda d: torch.save([1], of_last_stage(d, "optimizer"))),
        ["prank_{stage}_optimizer.pt", "list"],
    ),
    "optimizer with NaN": (
        resealed(
            lambda d: edit(
                of_last_stage(d, "optimizer"),
                lambda s: qkv(s["exp_avg"]).fill_(float("nan")),
            )
        ),
        ["2/prank_{stage}_optimizer.pt: exp_avg: {layer}.", QKV, "not finite"],
    ),
    "weights with NaN": (
        resealed(
            lambda d: edit(
                of_last_stage(d, "checkpoint"), lambda s: qkv(s).fill_(float("nan"))
            )
        ),
        ["prank_{stage}_checkpoint.pt", QKV, "not finite"],
    ),
    "weights of a stage missing": (
        resealed(lambda d: (of_last_stage(d, "checkpoint")).unlink()),
        ["2/prank_{stage}_checkpoint.pt: no such file, but prank_{stage}_manifest.json lists it"],
    ),
    "meta broken": (
        resealed(lambda d: cut(d / "2" / "meta.json")), ["meta.json", "not readable"],
    ),
    "config of the checkpoint broken": (
        resealed(lambda d: cut(d / "2" / "config.json")),
        ["2/config.json", "not readable"],
    ),
    "config of the checkpoint missing": (
        resealed(lambda d: (d / "2" / "config.json").unlink()),
        ["2/config.json: no such file, but prank_0_manifest.json lists it"],
    ),
    "weights that are not as saved": (
        lambda d: edit(of_last_stage(d, "checkpoint"), lambda s: qkv(s).neg_()),
        [
            "2/prank_{stage}_checkpoint.pt: damaged: ", "manifest.json says",
            "no complete checkpoint",
        ],
    ),
}  # fmt: skip


# Where one rank alone cannot make a mistake, or four show that all end alike.
WORLDS = {
    "another shard than replica 0's": 2, "another config": 2,
    "shard missing": 4, "another lr": 4, "held-out data on rank 0 alone": 4, "rank twice": 4,
    "an interface that is not there": 4, "a bad line in the middle of training": 4,
    "another seed": 4, "weights that are not as saved": 4,
}  # fmt: skip
SHAPES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # stages and replicas
LATE = "another lr, seen before all are there"


@dataclass(frozen=True)
class Worlds:
    """Runs of all mistakes, each in a world of its size, or all in worlds of four."""

    home: Path
    in_four: bool

    def size(self, name: str) -> int:
        return 4 if self.in_four else WORLDS.get(name, 1)

    def folder(self, name: str) -> Path:
        return self.home / "work" / f"{'four' if self.in_four else 'small'}-{_slug(name)}"

    def rank(self, name: str, rank: int) -> int:
        """Returns the rank that makes the mistake of `rank` in a world of four."""
        return min(rank, self.size(name) - 1)

    def words(self, name: str, words: Sequence[str], rank: int = 0) -> list[str]:
        """Returns the words of a line in this world, of a mistake of `rank`."""
        stage, rank = SHAPES[self.size(name)][0] - 1, self.rank(name, rank)
        batch = 2 * SHAPES[self.size(name)][1]
        values = {
            "{stage}": stage, "{layer}": 1 - stage, "{rank}": rank, "{home}": self.home,
            "{batch}": batch, "{large batch}": 2 * batch,
        }  # fmt: skip
        return [_replaced(word, values) for word in words]

    def run(self, name: str, changes: Mapping[int, Flags], size: int | None = None) -> Run:
        """Returns a run whose working directory is its own."""
        folder, size = self.folder(name), size or self.size(name)
        folder.mkdir(parents=True)
        stages, replicas = SHAPES[size]
        flags = right(self.home) | {
            "dist-url": f"tcp://127.0.0.1:{free_port()}",
            "checkpoint-path": folder / "checkpoints",
            "data-workers": 0,
            "world-size": size,
            "pipeline-group-size": stages,
            "data-group-size": replicas,
            "num-layers": 2 if stages == 2 else LAYERS,
        }
        by_rank = {min(rank, size - 1): changes[rank] for rank in sorted(changes, reverse=True)}
        own = [
            flags | {"rank": rank} | {k: at(self.home, v) for k, v in by_rank.get(rank, {}).items()}
            for rank in range(size)
        ]
        return Run(name, [Rank(argv(one), folder, hooks=[no_picture], timing=QUICK) for one in own])

    def first_runs(self, busy: str) -> list[list[Run]]:
        """A run for each mistake in FOLDERS and FLAGS, and those of a rank that is alone."""
        chains = []
        for name, (rank, spoil, _) in FOLDERS.items():
            model = copy_of(self.home, self.folder(name).name)
            spoil(model)
            chains.append([self.run(name, {rank: {"model-name": model}})])
        for name, (changes, _) in FLAGS.items():
            chains.append([self.run(name, changes)])
        late = self.run(LATE, {2: {"lr": 0.5}}, size=4)
        chains.append([replace(late, ranks=[*late.ranks[:3], replace(late.ranks[3], late=1.5)])])
        return chains + [[self.alone(name, flags)] for name, flags in mistakes_alone(busy).items()]

    def alone(self, name: str, flags: Flags) -> Run:
        """One rank of four."""
        one = self.run(name, {0: flags}, size=4)
        return replace(one, ranks=one.ranks[:1])

    def first_start(self, size: int) -> Run:
        """Nothing is wrong; it takes over the lock of a process that is dead."""
        one = self.run(f"{FIRST} {size}", {}, size)
        made = self.folder(one.name) / "checkpoints"
        made.mkdir()
        (made / ".lock").write_text("process 4194305 on a-machine-that-was")
        return one

    def second_runs(self) -> list[list[Run]]:
        """Starts with each mistake of RESUMES and STATES on what the first starts have left."""
        chains = []
        more: Flags = {"total-steps": 4}
        for name in [*RESUMES, *STATES]:
            flags = more | (RESUMES[name][0] if name in RESUMES else {})
            one = self.run(name, on_all(flags))
            first = self.folder(f"{FIRST} {self.size(name)}") / "checkpoints"
            made = self.folder(name) / "checkpoints"
            shutil.copytree(first, made)
            if name in STATES:
                STATES[name][0](made)
            chains.append([one])
        return chains


def mistakes_alone(busy: str) -> dict[str, Flags]:
    return {
        "a port in use": {"dist-url": busy},
        "a master that does not listen": {
            "rank": 1, "dist-url": f"tcp://127.0.0.1:{free_port()}", "join-timeout": 2,
        },
        "a master that another program is": {"rank": 1, "dist-url": busy, "join-timeout": 2},
        "a GPU that one process lacks": {
            "cuda-id": 5, "use-cuda": "true", "world-size": 1, "pipeline-group-size": 1,
            "data-group-size": 1, "num-layers": LAYERS,
        },
    }  # fmt: skip


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("'", "")


def _replaced(word: str, values: Mapping[str, object]) -> str:
    for name, value in values.items():
        word = word.replace(name, str(value))
    return word


FIRST = "a first start of"


@dataclass(frozen=True)
class Ends:
    """The ends of all runs by name."""

    worlds: Worlds
    outcomes: dict[str, Outcome]


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "in four"]
)
def ended(home: Path, request: pytest.FixtureRequest) -> Ends:
    worlds = Worlds(home, request.param)
    lock = lock_folder(home / "locked")
    with lock, socket.create_server(("127.0.0.1", 0)) as busy:
        url = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        firsts = [[worlds.first_start(size)] for size in (4, 1)]
        ends = run_all([*firsts, *worlds.first_runs(url)], at_once=4)
    return Ends(worlds, ends | run_all(worlds.second_runs(), at_once=4))


def test_the_first_start_is_right(ended: Ends) -> None:
    for size in (4, 1):
        outcome = ended.outcomes[f"{FIRST} {size}"]
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
def test_a_model_folder(name: str, ended: Ends) -> None:
    rank, _, words = FOLDERS[name]
    line, worlds = the_same_line(ended.outcomes[name]), ended.worlds
    assert all(word in line for word in worlds.words(name, words, rank)), line
    if worlds.size(name) > 1 and "not the same" not in "".join(words):  # which several ranks see
        seen_by = worlds.rank(name, rank)
        other = ended.outcomes[name][1 if seen_by == 0 else 0]
        assert f"rank {seen_by}: " in other.stderr, "the others name the rank that saw it"
    assert not (worlds.folder(name) / "ran").exists()


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_some_ranks(name: str, ended: Ends) -> None:
    line = the_same_line(ended.outcomes[name])
    assert all(word in line for word in ended.worlds.words(name, FLAGS[name][1])), line
    if "middle" in name:
        assert "step 1/200" in ended.outcomes[name][0].stdout


def test_a_late_rank_hears_of_it_too(ended: Ends) -> None:
    assert "--lr must be the same on all ranks" in the_same_line(ended.outcomes[LATE])


@pytest.mark.parametrize("name", [*RESUMES, *STATES])
def test_a_second_start(name: str, ended: Ends) -> None:
    line = the_same_line(ended.outcomes[name])
    words = (RESUMES | STATES)[name][1]
    assert all(word in line for word in ended.worlds.words(name, words)), line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a port in use", ["--dist-url", "in use on this machine"]),
        ("a master that does not listen", ["--dist-url", "no answer within 2 s (--join-timeout)"]),
        ("a master that another program is", ["--dist-url", "another program", "--join-timeout"]),
        ("a GPU that one process lacks", ["--use-cuda true", "0 CUDA devices"]),
    ],
)
def test_a_rank_alone(name: str, words: list[str], ended: Ends) -> None:
    (outcome,) = ended.outcomes[name]
    assert outcome.status == 2, outcome
    assert all(word in the_line(outcome.stderr) for word in words), outcome.stderr
    assert outcome.seconds < 30.0
