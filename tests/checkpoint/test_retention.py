"""Older checkpoints go, or lose their optimizer state, and what a crash leaves of that is whole."""

from __future__ import annotations

import importlib
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from checkpoint.retention import RetentionPolicy, prune
from checkpoint.steps import folder as step_folder
from checkpoint.steps.manifest import read_manifest
from checkpoint.store import CheckpointStore
from comm.backends.single_process import SingleProcessCommunicator
from comm.collective_io import BackgroundTask
from comm.topology import Topology
from tests.checkpoint.models import hf_weights, step_meta
from tests.checkpoint.test_damage import to_hf
from tests.kill_lab import leftovers, same, state
from tests.tasks.material import make_texts, write_jsonl
from tests.test_parity import make_shards
from tests.test_resume_rules import run_parts, train_alone, train_with
from training.run_start import open_run

STEPS = 10
KEPT, KEEP = ["6", "8", "10"], {"keep-checkpoints": 3, "keep-optimizer-states": 1}


class Killed(BaseException):
    """The end of a process, as far as its files show it."""


class AtOnce(BackgroundTask):
    """Work that is done when it is begun: a process that dies in it does nothing more."""

    def __init__(self, work: Callable[[], None]) -> None:
        work()
        super().__init__(lambda: None)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run that keeps all it saves, in `all`, and one that does not, in `few`."""
    folder = tmp_path_factory.mktemp("pruning")
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": 2})
    common = {
        "model-name": folder / "shards" / "model", "model-type": "gptneox", "num-layers": 2,
        "embedding-dim": 32, "task-name": folder / "a.jsonl", "seq-length": 16, "batch-size": 2,
        "total-steps": STEPS, "checkpoint-steps": 2, "lr": 1e-3, "use-cuda": "false",
    }  # fmt: skip
    (folder / "few" / "7").mkdir(parents=True)  # a user's, who calls things by numbers
    train_alone({**common, "checkpoint-path": folder / "all"})
    train_alone({**common, **KEEP, "checkpoint-path": folder / "few"})
    return {**common, **KEEP, "checkpoint-path": folder / "few"}


def steps_of(run: Path) -> list[str]:
    return sorted((path.name for path in run.glob("[0-9]*")), key=int)


def states_of(run: Path) -> list[str]:
    return [path.parent.name for path in run.glob("*/prank_0_optimizer.pt")]


def test_the_newest_steps_stay(flags: dict[str, Any]) -> None:
    run = flags["checkpoint-path"]
    assert steps_of(run) == ["6", "7", "8", "10"]
    assert not any((run / "7").iterdir())
    assert (run / "latest").read_text() == str(STEPS)
    assert leftovers(run) == []


def test_the_newest_of_them_alone_has_optimizer_state(flags: dict[str, Any]) -> None:
    run = flags["checkpoint-path"]
    assert states_of(run) == [str(STEPS)]
    assert same(state(run, 0, STEPS), state(run.parent / "all", 0, STEPS))


@pytest.mark.parametrize("step", KEPT)
def test_every_step_that_stays_can_be_converted(
    step: str, flags: dict[str, Any], tmp_path: Path
) -> None:
    run = flags["checkpoint-path"]
    few = hf_weights(to_hf(run / step, tmp_path / "few"))
    whole = hf_weights(to_hf(run.parent / "all" / step, tmp_path / "all"))
    assert few.keys() == whole.keys()
    assert all(torch.equal(few[key], whole[key]) for key in whole)


def test_training_does_not_go_on_without_optimizer_state(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(flags["checkpoint-path"], tmp_path / "run"))
    shutil.rmtree(run / str(STEPS))
    with pytest.raises(ValueError, match=r"/8/prank_0_optimizer\.pt: dropped") as caught:
        open_run(**run_parts({**flags, "checkpoint-path": run}))
    assert "--keep-optimizer-states" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_is_not_taken_for_dropped(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(flags["checkpoint-path"], tmp_path / "run"))
    (run / str(STEPS) / "prank_0_optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"prank_0_optimizer\.pt: no such file"):
        open_run(**run_parts({**flags, "checkpoint-path": run}))


@contextmanager
def killed_at(target: str, nth: int, *, after: bool) -> Iterator[None]:
    """The process ends before or after that call of a function of a module."""
    module, _, name = target.rpartition(".")
    original, calls = getattr(importlib.import_module(module), name), itertools.count(1)

    def dying(*args: Any, **options: Any) -> Any:
        is_last = next(calls) == nth
        result = None if is_last and not after else original(*args, **options)
        if is_last:
            raise Killed
        return result

    with patch(target, dying):
        yield


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "target", ["checkpoint.retention.withdraw", "checkpoint.retention.replace_file",
               "checkpoint.steps.folder._rename_if_there"],
)  # fmt: skip
def test_a_crash_while_old_steps_go_costs_nothing(
    target: str, after: bool, flags: dict[str, Any], tmp_path: Path
) -> None:
    """A save renames twice, and then once for each step that goes: the ninth is the first such."""
    again = {**flags, "checkpoint-path": tmp_path / "run"}
    nth = 9 if target.endswith("_rename_if_there") else 1
    at_once = patch("checkpoint.retention.BackgroundTask", AtOnce)
    with killed_at(target, nth, after=after), at_once, pytest.raises(Killed):
        train_alone(again)
    assert (tmp_path / "run" / "latest").read_text() == ("4" if "replace" in target else "8")
    for step in steps_of(tmp_path / "run"):
        folder = tmp_path / "run" / step
        read_manifest(folder, 0).check(folder)
    assert open_run(**run_parts(again)).step > 0
    train_with({**run_parts(again), "nonce": "another"})
    assert steps_of(tmp_path / "run") == KEPT
    assert states_of(tmp_path / "run") == [str(STEPS)]
    assert same(state(tmp_path / "run", 0, STEPS), state(flags["checkpoint-path"], 0, STEPS))
    assert leftovers(tmp_path / "run") == []


def test_old_steps_go_beside_training_and_before_the_next_is_written(tmp_path: Path) -> None:
    store = CheckpointStore(
        tmp_path,
        control=SingleProcessCommunicator(),
        topology=Topology(0, 1, 1),
        nonce="n",
        extras={},
        keep=RetentionPolicy(1),
    )
    trained = threading.Event()

    def save(step: int, *, hurry: bool = False) -> None:
        store.begin(step_meta(step), parts={"checkpoint": {}}, hurry=hurry)
        store.finish(hurry=hurry)

    def prune_slowly(*args: Any, **options: Any) -> None:
        assert trained.wait(30.0)
        prune(*args, **options)

    save(1)
    store.tidy()
    with patch("checkpoint.retention.prune", prune_slowly):
        save(2)
        save(3, hurry=True)  # as where the run is asked to stop
        assert steps_of(tmp_path) == ["1", "2", "3"]
        assert (tmp_path / "latest").read_text() == "3"
        trained.set()
        store.tidy()
    assert steps_of(tmp_path) == ["3"]
    save(4)
    store.begin(step_meta(5), parts={"checkpoint": {}})
    while store.is_writing:
        time.sleep(0.01)
    assert steps_of(tmp_path) == ["4"]
    store.finish()
    store.tidy()
    assert steps_of(tmp_path) == ["5"]
    assert leftovers(tmp_path) == []


def test_a_hurried_save_waits_for_room_where_there_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(
        tmp_path,
        control=SingleProcessCommunicator(),
        topology=Topology(0, 1, 1),
        nonce="n",
        extras={},
        keep=RetentionPolicy(1),
    )
    removed, tried = threading.Event(), threading.Event()
    write = step_folder.write_stage_files

    def write_where_there_is_room(*args: Any) -> Any:
        if removed.is_set():
            return write(*args)
        tried.set()
        raise OSError(28, "No space left on device")

    def prune_slowly(*args: Any, **options: Any) -> None:
        assert tried.wait(30.0)
        prune(*args, **options)
        removed.set()

    with patch("checkpoint.retention.prune", prune_slowly):
        store.begin(step_meta(1), parts={"checkpoint": {}})
        store.finish()
        with patch("checkpoint.steps.folder.write_stage_files", write_where_there_is_room):
            store.begin(step_meta(2), parts={"checkpoint": {}}, hurry=True)
            store.finish(hurry=True)
        store.tidy()
    assert steps_of(tmp_path) == ["2"]
    assert leftovers(tmp_path) == []


def test_what_cannot_be_removed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(
        tmp_path,
        control=SingleProcessCommunicator(),
        topology=Topology(0, 1, 1),
        nonce="n",
        extras={},
        keep=RetentionPolicy(1),
    )
    with patch("os.rmdir", side_effect=OSError(5, "Input/output error", "1")):
        for step in (1, 2):
            store.begin(step_meta(step), parts={"checkpoint": {}})
            store.finish()
        store.tidy()
    assert "older checkpoints could not be removed: [Errno 5] Input/output error" in caplog.text


def peak(
    saves: int, keep: RetentionPolicy, kept: tuple[int, int], weights: int, states: int
) -> int:
    """What such saves add at most, by writing and removing them one after the other."""
    there = [index >= kept[0] - kept[1] for index in range(kept[0])]  # whether each has its state
    sizes = [_size(there, weights, states)]
    for _ in range(saves):
        there.append(True)
        sizes.append(_size(there, weights, states))
        there = there[-keep.steps :] if keep.steps else there
        if keep.optimizer_states:
            last = len(there) - keep.optimizer_states
            there = [has and index >= last for index, has in enumerate(there)]
    return max(sizes) - sizes[0]


def _size(there: list[bool], weights: int, states: int) -> int:
    return len(there) * weights + sum(there) * states


@pytest.mark.parametrize("steps", [None, 1, 2, 4])
@pytest.mark.parametrize("states", [None, 1, 2, 3])
def test_the_disk_that_a_run_needs_is_foreseen(steps: int | None, states: int | None) -> None:
    keep = RetentionPolicy(steps, states)
    for saves, kept in itertools.product(range(7), ((0, 0), (1, 1), (3, 1), (3, 3), (6, 2))):
        foreseen = keep.added_bytes(saves, kept=kept, weights=4, state=8)
        needed = peak(saves, keep, kept, 4, 8)
        assert foreseen == needed if kept == (0, 0) else foreseen >= needed


def test_a_disk_that_does_not_let_latest_catch_up_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(
        tmp_path,
        control=SingleProcessCommunicator(),
        topology=Topology(0, 1, 1),
        nonce="n",
        extras={},
        keep=RetentionPolicy(),
    )
    full = OSError(28, "No space left on device")
    with patch("checkpoint.store.write_latest", side_effect=full):
        store.continue_from(4)
    assert f"{tmp_path / 'latest'} does not name step 4 yet: [Errno 28]" in caplog.text
    store.continue_from(4)
    assert (tmp_path / "latest").read_text() == "4"
