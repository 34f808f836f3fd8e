"""Tests that each damaged or foreign file of a checkpoint gives an error that names the file.

Two stages train four steps and save checkpoints at steps 2 and 4. Each case damages a copy of the
run's folder, or puts undamaged files of another checkpoint into the copy; no checksum detects such
files. The errors of training and of the converter must name the file.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from arguments.train import parse_train
from checkpoint.files.checksums import seal, sum_file, unseal
from checkpoint.steps.manifest import read_manifest
from comm.objects import gather_json
from comm.run_context import RunContext
from comm.topology import Topology
from tests.support.cases import Case, connected, meet_at, run_folder, to_argv, train_cases
from tests.support.checkpoint_models import cut, flip, hf_weights, to_hf
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from tests.support.refusal import refusal
from training.run_start import open_run

STAGES, LAST, FIRST = 2, 4, 2
FLAGS = flags_of("""
    --model-type gptneox --num-layers 2 --embedding-dim 32 --seq-length 16 --batch-size 2
    --total-steps 4 --checkpoint-steps 2 --use-cuda false
""")
PARTS = ("checkpoint", "optimizer", "scheduler")
STAGE_FILES = [f"prank_{stage}_{part}.pt" for stage in range(STAGES) for part in PARTS]
MANIFESTS = [f"prank_{stage}_manifest.json" for stage in range(STAGES)]
CONFIGS = [f"{name}.json" for name in ("config", "tokenizer", "tokenizer_config")]
COMMON = ["meta.json", "generation_config.json", *CONFIGS]
STEP_FILES = [f"{LAST}/{name}" for name in (*STAGE_FILES, *MANIFESTS, *COMMON)]
LATEST = ["latest", "latest_manifest.json"]
FILES = [*STEP_FILES, *LATEST]
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "a bit of the first byte": partial(flip, place=0.0),
    "a bit in the middle": flip,
    "a bit of the last byte": partial(flip, place=1.0),
}


def cases(files: list[str], damages: list[str], few: int) -> list[Any]:
    """Returns a test case for each pair of file and damage; most cases are marked slow.

    All cases of the files in LATEST are unmarked, and so are `few` cases of each other file.
    """
    found = []
    for number, file in enumerate(files):
        for turn, damage in enumerate(damages):
            is_default = file in LATEST or (turn - number) % (len(damages) // few) == 0
            found.append(pytest.param(file, damage, marks=() if is_default else pytest.mark.slow))
    return found


def bring_stage_of_first(run: Path) -> None:
    """Replaces stage 1's files of step 4 by those of step 2; a user may do this by mistake."""
    for path in (run / str(FIRST)).glob("prank_1_*"):
        shutil.copy(path, run / str(LAST))


def call_by_another_number(run: Path) -> None:
    shutil.copytree(run / str(LAST), run / "6")
    for path in run.glob("latest*"):
        path.unlink()


def reseal(path: Path, **changes: object) -> None:
    path.write_bytes(seal({**unseal(path), **changes}))


def bring_another_save(run: Path) -> None:
    reseal(run / str(LAST) / MANIFESTS[1], save="another")


def take_one_for_the_other(run: Path) -> None:
    shutil.copy(run / str(LAST) / MANIFESTS[0], run / str(LAST) / MANIFESTS[1])


def alter_meta(run: Path) -> None:
    """Changes the step in meta.json, and sets the new checksum of meta.json in each manifest."""
    path = run / str(LAST) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": FIRST}))
    for name in MANIFESTS:
        files = unseal(path.with_name(name))["files"]
        reseal(path.with_name(name), files={**files, path.name: sum_file(path)._asdict()})


# The function that changes a run's folder, and the words that the error must contain.
MOVED: dict[str, tuple[Callable[[Path], None], str]] = {
    "called 6": (call_by_another_number, f"/6/{MANIFESTS[0]}: belongs to step {LAST}"),
    "stage 1 of the first": (
        bring_stage_of_first,
        f"/{LAST}/{MANIFESTS[1]}: belongs to step {FIRST}",
    ),
    "another save": (bring_another_save, f"/{LAST}/{MANIFESTS[1]}: belongs to another save"),
    "another name": (take_one_for_the_other, f"/{LAST}/{MANIFESTS[1]}: belongs to stage 0"),
    "another meta.json": (alter_meta, f"/{LAST}/meta.json: belongs to step {FIRST}"),
}


def cut_both_steps(run: Path) -> None:
    for step in (FIRST, LAST):
        cut(run / str(step) / STAGE_FILES[-1])


# Changes that are neither damage to one file nor files of another step.
STATES: dict[str, Callable[[Path], object]] = {
    "as saved": lambda run: None,
    "last step moved away": lambda run: (run / str(LAST)).rename(run / "aside"),
    "last file of both steps": cut_both_steps,
}


def spoil(run: Path, name: str) -> None:
    file, _, damage = name.partition(": ")
    if damage:
        DAMAGES[damage](run / file)
    elif name in MOVED:
        MOVED[name][0](run)
    else:
        STATES[name](run)


@dataclass(frozen=True)
class Opened:
    """Result of opening a run's folder on one rank: the checkpoint's step, or the error."""

    step: int | None
    error: str


def train_and_open(
    rank: int,
    world: int,
    url: str,
    shape: Any,
    flags: dict[str, Any],
    folder: Path,
    names: list[str],
) -> dict[str, Opened]:
    """Trains a run; then, for each of `names`, changes a copy of the run and opens the copy."""
    train_cases(rank, world, url, [shape], [Case("run", flags)], folder)
    whole, run = run_folder(folder, "run", STAGES, 1), folder / "damaged"
    found: dict[str, Opened] = {}
    topology = Topology(rank, STAGES, 1)
    own = {"world-size": STAGES, "pipeline-group-size": STAGES, "rank": rank}
    settings = parse_train(to_argv({**flags, **own, "checkpoint-path": run}), {})
    with connected(topology, url) as (groups, nonce):
        for name in names:
            if rank == 0:
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(whole, run)
                spoil(run, name)
            gather_json(groups.control, None)
            try:
                context = RunContext(topology, groups, torch.device("cpu"), nonce)
                found[name] = Opened(open_run(settings, context).step, "")
            except ValueError as error:
                found[name] = Opened(None, str(error))
            gather_json(groups.control, None)
    return found


@dataclass(frozen=True)
class Made:
    """The undamaged run, and each rank's results of opening the damaged copies."""

    folder: Path
    run: Path
    opened: list[dict[str, Opened]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Made:
    """Trains one run; opens only those damaged copies of it that the selected tests need."""
    folder = tmp_path_factory.mktemp("damage")
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": 3})
    flags = FLAGS | {"model-name": folder / "shards" / "model", "task-name": folder / "a.jsonl"}
    damaged = [
        "{file}: {damage}".format(**item.callspec.params)
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.function is test_training_names_the_file_on_every_rank
    ]
    names = [*STATES, *MOVED, *damaged]
    (shape,) = meet_at([(STAGES, 1)])
    opened = run_ranks(STAGES, train_and_open, shape, flags, folder, names, deadline=240.0)
    return Made(folder, run_folder(folder, "run", STAGES, 1), opened)


def test_the_cases_are_all_files_of_a_checkpoint(made: Made) -> None:
    found = {str(path.relative_to(made.run)) for path in made.run.rglob("*") if path.is_file()}
    older = {file for file in found if file.startswith(f"{FIRST}/")}
    assert found - older - {"metrics.jsonl"} >= set(FILES)
    assert {file for file in found if file.startswith(f"{LAST}/")} == set(STEP_FILES)


def error_on_every_rank(name: str, made: Made) -> str:
    first, *others = (opened[name] for opened in made.opened)
    assert all(other == first for other in others)
    assert first.step is None
    assert "\n" not in first.error
    return first.error


@pytest.mark.parametrize(("file", "damage"), cases(FILES, list(DAMAGES), few=2))
def test_training_names_the_file_on_every_rank(file: str, damage: str, made: Made) -> None:
    """Every rank's error names the damaged file and, for a file of step 4, the complete step 2."""
    error = error_on_every_rank(f"{file}: {damage}", made)
    assert f"/{file}: " in error
    if file in STEP_FILES:
        assert f"the newest complete checkpoint before it is step {FIRST}" in error
        assert error.endswith(f"move {made.folder}/damaged/{LAST} away")


@pytest.mark.parametrize("name", MOVED)
def test_training_names_what_is_not_of_the_step(name: str, made: Made) -> None:
    """All ranks give the same error, which names the wrong file and an older complete step."""
    error = error_on_every_rank(name, made)
    assert MOVED[name][1] in error
    older = LAST if name.startswith("called") else FIRST
    assert f"the newest complete checkpoint before it is step {older}: " in error


def test_the_newest_step_that_is_whole_opens(made: Made) -> None:
    for opened in made.opened:
        assert opened["as saved"].step == LAST
        assert opened["last step moved away"].step == FIRST
        error = opened["last file of both steps"].error
        assert f"{LAST}/{STAGE_FILES[-1]}: " in error
        assert error.endswith("there is no complete checkpoint before this step")


def test_no_two_steps_of_a_start_are_one_save(made: Made) -> None:
    first, last = (
        {read_manifest(made.run / str(step), stage).save for stage in range(STAGES)}
        for step in (FIRST, LAST)
    )
    assert len(first) == len(last) == 1
    assert first != last


READ = [file for file in FILES if not file.endswith(("optimizer.pt", "scheduler.pt"))]
KINDS = ["cut", "gone", "a bit in the middle"]


@pytest.mark.parametrize(("file", "damage"), cases(READ, KINDS, few=1))
def test_the_converter_names_the_file(file: str, damage: str, made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    spoil(run, f"{file}: {damage}")
    assert f"/{file}: " in refusal(lambda: to_hf(run, tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", [name for name in MOVED if not name.startswith("called")])
def test_the_converter_names_what_is_not_of_the_step(name: str, made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    spoil(run, name)
    assert MOVED[name][1] in refusal(lambda: to_hf(run / str(LAST), tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_a_folder_of_any_name_converts_and_only_what_is_read_counts(
    made: Made, tmp_path: Path
) -> None:
    """The folder can have any name, and needs no optimizer and scheduler files for a conversion."""
    step = tmp_path / "gathered"
    step.mkdir()
    weights = [f"prank_{stage}_checkpoint.pt" for stage in range(STAGES)]
    for name in (*weights, *MANIFESTS, "meta.json"):
        shutil.copy(made.run / str(LAST) / name, step / name)
    config = str(made.folder / "shards" / "model")
    whole = hf_weights(to_hf(made.run, tmp_path / "whole"))
    numbered = Path(shutil.copytree(made.run / str(LAST), tmp_path / "6"))
    for found in (
        hf_weights(to_hf(step, tmp_path / "hf", config_name=config)),
        hf_weights(to_hf(numbered, tmp_path / "6 converted")),
    ):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
