"""Every file of a checkpoint cut, with a wrong bit, or gone, one at a time: an error that names it.

Two stages train four steps and save two; then each case damages a copy of what they left. What
training and the converter say of it is compared with the name of the file.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from arguments.train import parse_train
from checkpoint.files.checksums import seal, unseal
from checkpoint.steps.latest import check_latest, write_latest
from comm.objects import gather_json
from comm.run_context import RunContext
from comm.topology import Topology
from common.files import replace_file
from tests.support.cases import Case, connected, meet_at, run_folder, to_argv, train_cases
from tests.support.checkpoint_models import cut, flip, hf_weights, to_hf
from tests.support.data import make_texts, write_jsonl
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from training.run_start import open_run

STAGES, LAST, FIRST = 2, 4, 2
PARTS = ("checkpoint", "optimizer", "scheduler")
STAGE_FILES = [f"prank_{stage}_{part}.pt" for stage in range(STAGES) for part in PARTS]
MANIFESTS = [f"prank_{stage}_manifest.json" for stage in range(STAGES)]
COMMON = [
    "meta.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
]
STEP_FILES = [f"{LAST}/{name}" for name in (*STAGE_FILES, *MANIFESTS, *COMMON)]
FILES = [*STEP_FILES, "latest", "latest_manifest.json"]


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "empty": empty,
    "gone": Path.unlink,
    "a bit of the first byte": lambda path: flip(path, 0.0),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "a bit of the last byte": lambda path: flip(path, 1.0),
}
CASES = [(file, damage) for file in FILES for damage in DAMAGES]
# What is no damage of one file, and what comes of it.
STATES = ("as saved", "last step moved away", "last file of both steps")


@dataclass(frozen=True)
class Opened:
    """What came of opening a folder on one rank: the step, or the error."""

    step: int | None
    error: str


def spoil(run: Path, state: str) -> None:
    if state == "last step moved away":
        (run / str(LAST)).rename(run / "aside")
    if state == "last file of both steps":
        for step in (FIRST, LAST):
            cut(run / str(step) / STAGE_FILES[-1])


def open_all(
    rank: int, _world: int, url: str, flags: dict[str, Any], folder: Path, whole: Path
) -> dict[str, Opened]:
    """Opens a damaged copy of the run `whole` for each case, as a start that resumes does."""
    found: dict[str, Opened] = {}
    topology = Topology(rank, STAGES, 1)
    torch.set_num_threads(1)
    with connected(topology, url) as (groups, nonce):
        for name in (*STATES, *(f"{file}: {damage}" for file, damage in CASES)):
            run = folder / "damaged"
            if rank == 0:
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(whole, run)
                file, _, damage = name.partition(": ")
                DAMAGES[damage](run / file) if damage else spoil(run, name)
            gather_json(groups.control, None)
            own = {"checkpoint-path": run, "rank": rank, "total-steps": LAST}
            settings = parse_train(to_argv({**flags, **own}), {})
            try:
                context = RunContext(topology, groups, torch.device("cpu"), nonce)
                opened = open_run(settings, context)
                found[name] = Opened(opened.step, "")
            except ValueError as error:
                found[name] = Opened(None, str(error))
            gather_json(groups.control, None)
    return found


@dataclass(frozen=True)
class Made:
    """The run that nothing is wrong with, and how opening each damaged copy of it went, by rank."""

    folder: Path
    run: Path
    opened: list[dict[str, Opened]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("damage")
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": 3})
    flags = {
        "model-name": folder / "shards" / "model",
        "model-type": "gptneox",
        "num-layers": 2,
        "embedding-dim": 32,
        "task-name": folder / "a.jsonl",
        "seq-length": 16,
        "batch-size": 2,
        "total-steps": LAST,
        "checkpoint-steps": FIRST,
        "use-cuda": "false",
    }
    ((*shape, url),) = meet_at([(STAGES, 1)])
    run_ranks(STAGES, train_cases, [(*shape, url)], [Case("run", flags)], folder)
    whole = run_folder(folder, "run", STAGES, 1)
    flags |= {"world-size": STAGES, "pipeline-group-size": STAGES}
    opened = run_ranks(STAGES, open_all, flags, folder, whole, deadline=240.0)
    return Made(folder, whole, opened)


def test_the_cases_are_all_files_of_a_checkpoint(made: Made) -> None:
    found = {str(path.relative_to(made.run)) for path in made.run.rglob("*") if path.is_file()}
    older = {file for file in found if file.startswith(f"{FIRST}/")}
    assert found - older - {"metrics.jsonl"} >= set(FILES)
    assert {file for file in found if file.startswith(f"{LAST}/")} == set(STEP_FILES)


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_training_names_the_file_on_every_rank(file: str, damage: str, made: Made) -> None:
    """And the step before it, where the step is damaged and not `latest`."""
    one, other = (opened[f"{file}: {damage}"] for opened in made.opened)
    assert one == other
    assert one.step is None
    assert f"/{file}: " in one.error
    assert "\n" not in one.error
    if file in STEP_FILES:
        assert f"the newest complete checkpoint before it is step {FIRST}" in one.error
        assert one.error.endswith(f"move {made.folder}/damaged/{LAST} away")


def test_what_is_whole_opens(made: Made) -> None:
    assert [opened["as saved"].step for opened in made.opened] == [LAST, LAST]


def test_the_step_before_opens_where_the_damaged_one_has_been_moved_away(made: Made) -> None:
    assert [opened["last step moved away"].step for opened in made.opened] == [FIRST, FIRST]


def test_no_step_is_offered_where_none_is_whole(made: Made) -> None:
    for opened in made.opened:
        error = opened["last file of both steps"].error
        assert f"{LAST}/{STAGE_FILES[-1]}: " in error
        assert error.endswith("no complete checkpoint before it is there")


READ = [file for file in FILES if not file.endswith(("optimizer.pt", "scheduler.pt"))]


@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("damage", ["cut", "gone", "a bit in the middle"])
def test_the_converter_names_the_file(file: str, damage: str, made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    DAMAGES[damage](run / file)
    with pytest.raises(ValueError, match=f"/{file}: ") as caught:
        to_hf(run, tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_the_converter_checks_what_it_reads_alone(made: Made, tmp_path: Path) -> None:
    """As where a user gathers the weights on one machine, and names a config of its own."""
    step = tmp_path / "gathered"
    step.mkdir()
    weights = [f"prank_{stage}_checkpoint.pt" for stage in range(STAGES)]
    for name in (*weights, *MANIFESTS, "meta.json"):
        shutil.copy(made.run / str(LAST) / name, step / name)
    to_hf(step, tmp_path / "hf", str(made.folder / "shards" / "model"))
    whole = hf_weights(to_hf(made.run, tmp_path / "whole"))
    converted = hf_weights(tmp_path / "hf")
    assert converted.keys() == whole.keys()
    assert all(torch.equal(converted[key], whole[key]) for key in whole)


def test_stages_of_different_saves_do_not_convert(made: Made, tmp_path: Path) -> None:
    step = Path(shutil.copytree(made.run / str(LAST), tmp_path / "mixed"))
    path = step / MANIFESTS[1]
    path.write_bytes(seal({**unseal(path), "save": "another"}))
    with pytest.raises(ValueError, match=f"/{MANIFESTS[1]}: of another save"):
        to_hf(step, tmp_path / "hf")


def test_every_bit_of_latest_counts(made: Made, tmp_path: Path) -> None:
    """Also where it then names another step that is there."""
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    for step in (0, 6, 20):
        (run / str(step)).mkdir()
    for bit in range(8):
        (run / "latest").write_bytes(bytes([ord(str(LAST)) ^ (1 << bit)]))
        with pytest.raises(ValueError, match="/latest: damaged"):
            check_latest(run, has_manifests=True)


@pytest.mark.parametrize("step", [FIRST, LAST + 2])
@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_crash_while_latest_moves_is_no_damage(
    step: int, written: int, made: Made, tmp_path: Path
) -> None:
    """Down, as where a run goes back since the last step was moved away, and up; after so many of
    the files that it writes."""
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    (run / str(LAST + 2)).mkdir()
    if step < LAST:
        (run / str(LAST)).rename(run / "aside")
    left = [replace_file] * written

    def dying(path: Path, content: bytes) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()(path, content)

    with patch("checkpoint.steps.latest.replace_file", dying), suppress(KeyboardInterrupt):
        write_latest(run, step)
    check_latest(run, has_manifests=True)
    assert (run / "latest").read_text() == str(step if written > 1 else LAST)
    write_latest(run, FIRST)
    check_latest(run, has_manifests=True)
    assert (run / "latest").read_text() == str(FIRST)
