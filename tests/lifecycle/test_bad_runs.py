"""What needs several ranks, or a machine that is not as it should be, in real processes.

Every rank ends with one line, the same, and exit status 2.
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
from tests.support.checkpoint_models import reseal
from tests.support.data import tokenizer
from tests.support.launcher import free_port
from tests.support.runs import Outcome, Rank, Run, run_all
from tests.support.valid_run import LAYERS, ROOT, VOCAB, Flags, argv, at, make_home, right, the_line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("bad-input"))


def commands(*given: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """What a user would start, all at once, with nothing but this process's environment."""
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "dist_clm_train.py"), *one],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={key: value for key, value in os.environ.items() if key != "TORCH_CPP_LOG_LEVEL"}
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        for one in given
    ]  # fmt: skip
    ended = [(process, *process.communicate(timeout=150)) for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in ended]


def test_a_command_with_a_wrong_flag(home: Path) -> None:
    flags = [right(home) | {"rank": rank, "lr": "fast"} for rank in range(4)]
    for done in commands(*map(argv, flags)):
        assert done.returncode == 2
        assert the_line(done.stderr) == "--lr: expected a number of at least 0, got 'fast'"


def test_a_command_with_a_shard_that_one_rank_lacks(home: Path) -> None:
    """Nothing but our line on stderr, of torch's C++ side either."""
    model = copy_of(home, "command")
    (model / "pytorch_lm_head.pt").unlink()
    flags = right(home) | {"dist-url": f"tcp://127.0.0.1:{free_port()}"}
    flags["checkpoint-path"] = home / "runs" / "command"
    ranks = [flags | {"rank": rank} for rank in range(4)]
    ranks[3]["model-name"] = model
    path = model / "pytorch_lm_head.pt"
    for rank, done in enumerate(commands(*map(argv, ranks))):
        assert done.returncode == 2
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
        ["--model-name", "stage 1", "not the same for all replicas"],
    ),
    "another shard than was converted": (
        3, lambda d: negate_converted(d / LAST),
        [LAST, "damaged: ", "remove manifest.json to load the folder unverified"],
    ),
    "another config": (
        3, lambda d: edit_config(d, layer_norm_eps=1e-6),
        ["--model-name", "config.json is not the same on rank 0 and rank 3"],
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


# Flags of a second start on a checkpoint of the first, and the words of the line.
RESUMES: dict[str, tuple[Flags, list[str]]] = {
    "another seed": ({"seed": 7}, ["--seed is 7", "made with 42"]),
    "another batch": ({"batch-size": 4}, ["the global batch", "is 8", "made with 4"]),
    "other blocks": ({"seq-length": 16}, ["--seq-length is 16", "made with 24"]),
    "other data": ({"task-name": "{home}/broken.jsonl"}, ["--task-name is", "made with"]),
    "no resume wanted": (
        {"load-checkpoint": "false"}, ["--load-checkpoint false", "--checkpoint-path"],
    ),
}  # fmt: skip
STATES: dict[str, tuple[Spoil, list[str]]] = {
    "optimizer of nonsense": (
        resealed(lambda d: torch.save([1], d / "2" / "prank_1_optimizer.pt")),
        ["prank_1_optimizer.pt", "list"],
    ),
    "optimizer with NaN": (
        resealed(
            lambda d: edit(
                d / "2" / "prank_1_optimizer.pt",
                lambda s: s["exp_avg"][f"0.{QKV}"].fill_(float("nan")),
            )
        ),
        ["2/prank_1_optimizer.pt: exp_avg: 0.", QKV, "not finite"],
    ),
    "weights with NaN": (
        resealed(
            lambda d: edit(
                d / "2" / "prank_1_checkpoint.pt", lambda s: s[f"0.{QKV}"].fill_(float("nan"))
            )
        ),
        ["prank_1_checkpoint.pt", QKV, "not finite"],
    ),
    "weights of a stage missing": (
        resealed(lambda d: (d / "2" / "prank_1_checkpoint.pt").unlink()),
        ["2/prank_1_checkpoint.pt: no such file, but prank_1_manifest.json lists it"],
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
        lambda d: edit(d / "2" / "prank_1_checkpoint.pt", lambda s: s[f"0.{QKV}"].neg_()),
        ["2/prank_1_checkpoint.pt: damaged: ", "manifest.json says", "no complete checkpoint"],
    ),
}  # fmt: skip


def ranks_of(home: Path, name: str, changes: Mapping[int, Flags]) -> list[Rank]:
    """Four ranks; their working directory is the run's own."""
    folder = home / "work" / _slug(name)
    folder.mkdir(parents=True)
    flags = right(home) | {
        "dist-url": f"tcp://127.0.0.1:{free_port()}",
        "checkpoint-path": folder / "checkpoints",
    }
    own = [
        flags | {"rank": rank} | {k: at(home, v) for k, v in changes.get(rank, {}).items()}
        for rank in range(4)
    ]
    return [Rank(argv(one), folder) for one in own]


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("'", "")


LATE = "another lr, seen before all are there"


def first_runs(home: Path, busy: str) -> list[list[Run]]:
    """A run for each mistake in FOLDERS and FLAGS, and those of a rank that is alone."""
    chains = []
    for name, (rank, spoil, _) in FOLDERS.items():
        model = copy_of(home, _slug(name))
        spoil(model)
        chains.append([Run(name, ranks_of(home, name, {rank: {"model-name": model}}))])
    for name, (changes, _) in FLAGS.items():
        chains.append([Run(name, ranks_of(home, name, changes))])
    ranks = ranks_of(home, LATE, {2: {"lr": 0.5}})
    chains.append([Run(LATE, [*ranks[:3], replace(ranks[3], late=2.0)])])
    alone: dict[str, Flags] = {
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
    for name, flags in alone.items():
        ranks = ranks_of(home, name, {0: flags})
        chains.append([Run(name, ranks[:1])])
    return chains


@pytest.fixture(scope="module")
def ended(home: Path) -> dict[str, Outcome]:
    """How all runs ended."""
    tokenizer().save_pretrained(home / "longer")
    path = home / "longer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["unheard-of"] = VOCAB
    path.write_text(json.dumps(content))
    shutil.copytree(home / "m", home / "large")
    (home / "large" / "manifest.json").unlink()
    edit(home / "large" / LAST, lambda s: s[QKV][0].fill_(-1e5))
    lock = lock_folder(home / "locked")
    with lock, socket.create_server(("127.0.0.1", 0)) as busy:
        url = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        chains = [[first_start(home)], *first_runs(home, url)]
        ends = run_all(chains, at_once=3)
    return ends | run_all(second_runs(home), at_once=3)


FIRST = "a first start"


def first_start(home: Path) -> Run:
    """Nothing is wrong; it takes over the lock of a process that is dead."""
    ranks = ranks_of(home, FIRST, {})
    made = home / "work" / _slug(FIRST) / "checkpoints"
    made.mkdir()
    (made / ".lock").write_text("process 4194305 on a-machine-that-was")
    return Run(FIRST, ranks)


def second_runs(home: Path) -> list[list[Run]]:
    """Starts with each mistake of RESUMES and STATES on what the first start has left."""
    chains = []
    more: Flags = {"total-steps": 4}
    for name in [*RESUMES, *STATES]:
        flags = more | (RESUMES[name][0] if name in RESUMES else {})
        ranks = ranks_of(home, name, on_all(flags))
        made = home / "work" / _slug(name) / "checkpoints"
        shutil.copytree(home / "work" / _slug(FIRST) / "checkpoints", made)
        if name in STATES:
            STATES[name][0](made)
        chains.append([Run(name, ranks)])
    return chains


def test_the_first_start_is_right(ended: dict[str, Outcome]) -> None:
    for outcome in ended[FIRST]:
        assert (outcome.status, outcome.stderr) == (0, "")


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
def test_a_model_folder(name: str, home: Path, ended: dict[str, Outcome]) -> None:
    rank, _, words = FOLDERS[name]
    line = the_same_line(ended[name])
    assert all(word in line for word in words), line
    if "not the same" not in "".join(words):  # which several ranks see
        other = 1 if rank == 0 else 0
        assert f"rank {rank}: " in ended[name][other].stderr, "the others name the rank that saw it"
    assert not (home / "work" / _slug(name) / "ran").exists()


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_some_ranks(name: str, home: Path, ended: dict[str, Outcome]) -> None:
    line = the_same_line(ended[name])
    assert all(at(home, word) in line for word in FLAGS[name][1]), line
    if "middle" in name:
        assert "step 1/200" in ended[name][0].stdout


def test_a_late_rank_hears_of_it_too(ended: dict[str, Outcome]) -> None:
    assert "--lr must be the same on all ranks" in the_same_line(ended[LATE])


@pytest.mark.parametrize("name", [*RESUMES, *STATES])
def test_a_second_start(name: str, home: Path, ended: dict[str, Outcome]) -> None:
    line = the_same_line(ended[name])
    words = (RESUMES | STATES)[name][1]
    assert all(at(home, word) in line for word in words), line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a port in use", ["--dist-url", "in use on this machine"]),
        ("a master that does not listen", ["--dist-url", "no answer within 2 s (--join-timeout)"]),
        ("a master that another program is", ["--dist-url", "another program", "--join-timeout"]),
        ("a GPU that one process lacks", ["--use-cuda true", "0 CUDA devices"]),
    ],
)
def test_a_rank_alone(name: str, words: list[str], ended: dict[str, Outcome]) -> None:
    (outcome,) = ended[name]
    assert outcome.status == 2, outcome
    assert all(word in the_line(outcome.stderr) for word in words), outcome.stderr
    assert outcome.seconds < 30.0
