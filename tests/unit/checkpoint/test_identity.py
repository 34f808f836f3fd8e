"""Files of several steps or saves in one folder are not taken for one, whatever brought them there.

Two stages train four steps and save two, in one start. Each case then moves whole files about in a
copy: nothing is damaged, so no checksum tells.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
from tests.support.checkpoint_models import hf_weights, to_hf
from tests.support.data import make_texts, write_jsonl
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from training.run_start import open_run

STAGES, LAST, FIRST = 2, 4, 2
MANIFESTS = [f"prank_{stage}_manifest.json" for stage in range(STAGES)]


def call_by_another_number(run: Path) -> None:
    shutil.copytree(run / str(LAST), run / "6")
    for path in run.glob("latest*"):
        path.unlink()


def bring_stage_of_first(run: Path) -> None:
    """As where stage 1's disk is gathered from, and the wrong folder is named."""
    for path in (run / str(FIRST)).glob("prank_1_*"):
        shutil.copy(path, run / str(LAST))


def reseal(path: Path, **changes: object) -> None:
    path.write_bytes(seal({**unseal(path), **changes}))


def bring_another_save(run: Path) -> None:
    reseal(run / str(LAST) / MANIFESTS[1], save="another")


def take_one_for_the_other(run: Path) -> None:
    shutil.copy(run / str(LAST) / MANIFESTS[0], run / str(LAST) / MANIFESTS[1])


def alter_meta(run: Path) -> None:
    """All that one disk's folder has is of one save, but for the step in its meta.json."""
    path = run / str(LAST) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": FIRST}))
    for name in MANIFESTS:
        files = unseal(path.with_name(name))["files"]
        reseal(path.with_name(name), files={**files, path.name: sum_file(path)._asdict()})


# What is done to a run, and what training says, from the step's folder on.
SPOILS: dict[str, tuple[Callable[[Path], None], str]] = {
    "called 6": (call_by_another_number, f"/6/{MANIFESTS[0]}: of step {LAST}"),
    "stage 1 of the first": (bring_stage_of_first, f"/{LAST}/{MANIFESTS[1]}: of step {FIRST}"),
    "another save": (bring_another_save, f"/{LAST}/{MANIFESTS[1]}: of another save"),
    "another name": (take_one_for_the_other, f"/{LAST}/{MANIFESTS[1]}: of stage 0"),
    "another meta.json": (alter_meta, f"/{LAST}/meta.json: of step {FIRST}"),
}
MIXED = [name for name in SPOILS if not name.startswith("called")]


def open_all(
    rank: int, _world: int, url: str, flags: dict[str, Any], folder: Path, whole: Path
) -> dict[str, int | str]:
    """The step that a start finds in each spoilt copy of the run `whole`, or its error."""
    found: dict[str, int | str] = {}
    topology = Topology(rank, STAGES, 1)
    torch.set_num_threads(1)
    with connected(topology, url) as (groups, nonce):
        for name, (spoil, _) in SPOILS.items():
            run = folder / name
            if rank == 0:
                shutil.copytree(whole, run)
                spoil(run)
            gather_json(groups.control, None)
            settings = parse_train(to_argv({**flags, "checkpoint-path": run, "rank": rank}), {})
            try:
                context = RunContext(topology, groups, torch.device("cpu"), nonce)
                opened = open_run(settings, context)
                found[name] = opened.step
            except ValueError as error:
                found[name] = str(error)
            gather_json(groups.control, None)
    return found


@dataclass(frozen=True)
class Made:
    """The run as it was saved, and how opening each copy of it went, by rank."""

    run: Path
    opened: list[dict[str, int | str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("identity")
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": 3})
    flags = {
        "model-name": folder / "shards" / "model", "model-type": "gptneox", "num-layers": 2,
        "embedding-dim": 32, "task-name": folder / "a.jsonl", "seq-length": 16, "batch-size": 2,
        "total-steps": LAST, "checkpoint-steps": FIRST, "use-cuda": "false",
    }  # fmt: skip
    ((*shape, url),) = meet_at([(STAGES, 1)])
    run_ranks(STAGES, train_cases, [(*shape, url)], [Case("run", flags)], folder)
    whole = run_folder(folder, "run", STAGES, 1)
    flags |= {"world-size": STAGES, "pipeline-group-size": STAGES}
    return Made(whole, run_ranks(STAGES, open_all, flags, folder, whole))


@pytest.mark.parametrize("name", SPOILS)
def test_training_names_what_is_not_of_the_step(name: str, made: Made) -> None:
    """On every rank, and the step before it that is whole."""
    one, other = (opened[name] for opened in made.opened)
    assert one == other
    assert isinstance(one, str), f"went on from step {one}"
    assert SPOILS[name][1] in one
    assert "\n" not in one
    older = LAST if name.startswith("called") else FIRST
    assert f"the newest complete checkpoint before it is step {older}: " in one


def test_no_two_steps_of_a_start_are_one_save(made: Made) -> None:
    saves = [
        [read_manifest(made.run / str(step), stage).save for stage in range(STAGES)]
        for step in (FIRST, LAST)
    ]
    assert [len(set(of_a_step)) for of_a_step in saves] == [1, 1]
    assert saves[0] != saves[1]


@pytest.mark.parametrize("name", MIXED)
def test_the_converter_names_what_is_not_of_the_step(name: str, made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    SPOILS[name][0](run)
    with pytest.raises(ValueError, match=SPOILS[name][1]) as caught:
        to_hf(run / str(LAST), tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_a_folder_of_any_name_converts(made: Made, tmp_path: Path) -> None:
    whole = hf_weights(to_hf(made.run, tmp_path / "whole"))
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    for name in ("gathered", "6"):
        folder = Path(shutil.copytree(run / str(LAST), tmp_path / name))
        found = hf_weights(to_hf(folder, tmp_path / f"{name} converted"))
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
