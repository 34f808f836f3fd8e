"""Tests that a mistake in files of a model or checkpoint gives every rank the same error line.

Each mistake has its own run. Most runs have one rank; WORLDS lists the mistakes whose runs have
more ranks. The unit tests of the code that reads weights try more mistakes in files of weights.
"""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoint_models import edit_json, reseal
from tests.support.mistakes import Outcomes, folder_of, on_all, start, the_same_line
from tests.support.refusal import RunsCode
from tests.support.runs import Run, run_all
from tests.support.valid_run import make_home

QKV, LAST = "attention.query_key_value.weight", "pytorch_2.pt"
FIRST = "a first start of"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("bad-files"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def break_json(path: Path) -> None:
    path.write_text("{")


def drop_end_of_text(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


# Rank, the damage to its model folder, and the words of the error line.
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


def in_step(name: str, spoil: Spoil) -> Spoil:
    """Returns a function that damages a file of step 2 and updates the manifests' checksums."""

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


# Flags of a second start, the damage to the first start's checkpoint, and the words of the error
# line. The tests of resume change more flags.
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


# Mistakes that need several ranks, and mistakes for which four ranks must end in the same way.
WORLDS = {
    "another shard than replica 0's": 2,
    "another config": 2,
    "shard missing": 4,
    "another seed": 4,
    "weights that are not as saved": 4,
}


def first_runs(home: Path) -> list[Run]:
    """Returns two correct runs, for second_run to resume, and a run for each mistake in FOLDERS."""
    runs = [first_start(home, size) for size in (4, 1)]
    for name, (rank, spoil, _) in FOLDERS.items():
        # Without a manifest, as in a published model, so that the reader itself finds the mistake.
        model = shutil.copytree(home / "m", home / "copies" / folder_of(home, name).name)
        (model / "manifest.json").unlink()
        spoil(model)
        runs.append(start(home, name, {rank: f"--model-name {model}"}, WORLDS.get(name, 1)))
    return runs


def first_start(home: Path, size: int) -> Run:
    """Returns a run without a mistake; its checkpoint folder has the lock of a dead process."""
    one = start(home, f"{FIRST} {size}", {}, size)
    made = folder_of(home, one.name) / "checkpoints"
    made.mkdir()
    (made / ".lock").write_text("process 4194305 on a-machine-that-was")
    return one


def second_run(home: Path, name: str) -> Run:
    """Returns a run that has the mistake RESUMES[name]; it resumes a copy of a correct run."""
    flags, spoil, _ = RESUMES[name]
    one = start(home, name, on_all(f"--total-steps 4 {flags}"), WORLDS.get(name, 1))
    made = folder_of(home, name) / "checkpoints"
    shutil.copytree(folder_of(home, f"{FIRST} {len(one.ranks)}") / "checkpoints", made)
    spoil(made)
    return one


@pytest.fixture(scope="module")
def ended(home: Path) -> Outcomes:
    """Returns the outcomes of all runs by name."""
    ends = run_all([[one] for one in first_runs(home)], at_once=4)
    return ends | run_all([[second_run(home, name)] for name in RESUMES], at_once=4)


def test_the_first_start_is_right(ended: Outcomes) -> None:
    for size in (4, 1):
        outcome = ended[f"{FIRST} {size}"]
        assert outcome.statuses == [0] * size
        assert outcome.lines == [[]] * size


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_folder(name: str, home: Path, ended: Outcomes) -> None:
    line, (rank, _, words) = the_same_line(ended[name]), FOLDERS[name]
    assert all(word in line for word in words), line
    if name == "shard missing":  # only one rank sees it
        assert f"rank {rank}: " in ended[name][0].stderr, "the others name the rank that saw it"
    assert not (folder_of(home, name) / "ran").exists()


@pytest.mark.parametrize("name", RESUMES)
def test_a_second_start(name: str, ended: Outcomes) -> None:
    line = the_same_line(ended[name])
    assert all(word in line for word in RESUMES[name][2]), line
