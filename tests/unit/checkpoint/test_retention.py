"""Tests the deletion of old checkpoints and optimizer states, also after a crash."""

import importlib
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from checkpoint.retention import RetentionPolicy, delete_old_steps
from checkpoint.steps import folder as step_folder
from checkpoint.steps.manifest import read_manifest
from checkpoint.store import CheckpointStore, SaveFailedError
from comm.backends.single_process import SingleProcessCommunicator
from comm.collective_io import BackgroundTask
from comm.topology import Topology
from tests.support.alone import run_parts, train_alone
from tests.support.cases import train_with
from tests.support.checkpoint_models import hf_weights, step_meta, to_hf
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.kill_lab import leftovers, same, state
from tests.support.models import make_shards
from tests.support.refusal import refusal
from training.run_start import open_run

STEPS = 10
FLAGS = flags_of("""
    --model-type gptneox --num-layers 2 --embedding-dim 32 --seq-length 16 --batch-size 2
    --total-steps 10 --checkpoint-steps 2 --lr 1e-3 --use-cuda false
""")
KEPT, KEEP = ["6", "8", "10"], {"keep-checkpoints": 3, "keep-optimizer-states": 1}


class Killed(BaseException):
    """Exception that simulates the death of the process; after it, only the files remain."""


class AtOnce(BackgroundTask):
    """Background task that runs in its constructor, so that `Killed` in the task ends the run."""

    def __init__(self, work: Callable[[], None]) -> None:
        work()
        super().__init__(lambda: None)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trains two runs: `all` keeps all steps, `few` keeps 3 steps; returns the flags of `few`."""
    folder = tmp_path_factory.mktemp("pruning")
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": 2})
    common = FLAGS | {"model-name": folder / "shards" / "model", "task-name": folder / "a.jsonl"}
    (folder / "few" / "7").mkdir(parents=True)  # a user's own folder with a number as its name
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
    parts = run_parts({**flags, "checkpoint-path": run})
    refused = refusal(lambda: open_run(**parts))
    assert "/8/prank_0_optimizer.pt: deleted" in refused
    assert "--keep-optimizer-states" in refused
    # a missing file is not reported as deleted
    shutil.copytree(flags["checkpoint-path"] / str(STEPS), run / str(STEPS))
    (run / str(STEPS) / "prank_0_optimizer.pt").unlink()
    assert "prank_0_optimizer.pt: no such file" in refusal(lambda: open_run(**parts))


@contextmanager
def killed_at(target: str, nth: int, *, after: bool) -> Iterator[None]:
    """Makes the `nth` call of the function `target` raise `Killed`, before or after its work."""
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
    "target", ["retention.delete_step", "retention.replace_file", "steps.folder._rename_if_exists"]
)
def test_a_crash_while_old_steps_go_costs_nothing(
    target: str, after: bool, flags: dict[str, Any], tmp_path: Path
) -> None:
    """If a run dies during a deletion, the next run ends with the same files as without a crash."""
    again = {**flags, "checkpoint-path": tmp_path / "run"}
    nth = 9 if target.endswith("_rename_if_exists") else 1  # four saves have two renames each
    at_once = patch("checkpoint.retention.BackgroundTask", AtOnce)
    with killed_at(f"checkpoint.{target}", nth, after=after), at_once, pytest.raises(Killed):
        train_alone(again)
    assert (tmp_path / "run" / "latest").read_text() == ("4" if "replace" in target else "8")
    for step in steps_of(tmp_path / "run"):
        folder = tmp_path / "run" / step
        read_manifest(folder, 0).check(folder)
    assert open_run(**run_parts(again)).step > 0
    parts = run_parts(again)
    train_with(parts["settings"], replace(parts["context"], start="another"))
    assert steps_of(tmp_path / "run") == KEPT
    assert states_of(tmp_path / "run") == [str(STEPS)]
    assert same(state(tmp_path / "run", 0, STEPS), state(flags["checkpoint-path"], 0, STEPS))
    assert leftovers(tmp_path / "run") == []


def make_store(path: Path, policy: RetentionPolicy) -> CheckpointStore:
    alone: dict[str, Any] = {"control": SingleProcessCommunicator(), "topology": Topology(0, 1, 1)}
    return CheckpointStore(path, **alone, nonce="n", extras={}, policy=policy)


def save(store: CheckpointStore, *steps: int, is_last: bool = False) -> None:
    for step in steps:
        store.begin(step_meta(step), parts={"checkpoint": {}})
        store.finish()
        if not is_last:
            store.start_cleanup()


def test_old_steps_go_beside_training(tmp_path: Path) -> None:
    """A slow deletion delays no save; the next run deletes old steps that this run has left."""
    store = make_store(tmp_path, RetentionPolicy(1))
    trained = threading.Event()

    def delete_slowly(*args: Any, **options: Any) -> None:
        assert trained.wait(30.0)
        delete_old_steps(*args, **options)

    with patch("checkpoint.retention.delete_old_steps", delete_slowly):
        save(store, 1, 2, 3)
        save(store, 4, is_last=True)
        assert steps_of(tmp_path) == ["1", "2", "3", "4"]
        assert (tmp_path / "latest").read_text() == "4"
        trained.set()
        store.finish_cleanup()
    assert steps_of(tmp_path) == ["4"]
    save(store, 5, is_last=True)  # then the run is stopped
    again = make_store(tmp_path, RetentionPolicy(1))
    save(again, 6)
    again.finish_cleanup()
    assert steps_of(tmp_path) == ["6"]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("makes_room", [True, False])
def test_a_write_that_fails_is_tried_again_once_old_steps_are_gone(
    makes_room: bool, tmp_path: Path
) -> None:
    store = make_store(tmp_path, RetentionPolicy(1))
    removed, tried = threading.Event(), threading.Event()
    write = step_folder.write_stage_files

    def write_where_there_is_room(*args: Any) -> Any:
        if removed.is_set() and makes_room:
            return write(*args)
        tried.set()
        raise OSError(28, "No space left on device")

    def delete_slowly(*args: Any, **options: Any) -> None:
        assert tried.wait(30.0)
        delete_old_steps(*args, **options)
        removed.set()

    with patch("checkpoint.retention.delete_old_steps", delete_slowly):
        save(store, 1, is_last=True)
        save(store, 2)
        with patch("checkpoint.steps.folder.write_stage_files", write_where_there_is_room):
            fails = pytest.raises(SaveFailedError, match="step 3")
            with nullcontext() if makes_room else fails:
                save(store, 3)
        store.finish_cleanup()
    assert steps_of(tmp_path) == ["3" if makes_room else "2"]
    assert leftovers(tmp_path) == []


def test_what_cannot_be_removed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path, RetentionPolicy(1))
    with patch("os.rmdir", side_effect=OSError(5, "Input/output error", "1")):
        save(store, 1, 2)
        store.finish_cleanup()
    assert "older checkpoints could not be removed: [Errno 5] Input/output error" in caplog.text


def peak(saves: int, keep: RetentionPolicy, kept: tuple[int, int]) -> int:
    """Simulates saves and deletions; returns the peak of bytes on disk minus those at the start."""
    there = [index >= kept[0] - kept[1] for index in range(kept[0])]  # whether a step has state
    sizes = [len(there) * 4 + sum(there) * 8]
    for _ in range(saves):
        there.append(True)
        sizes.append(len(there) * 4 + sum(there) * 8)
        there = there[-keep.steps :] if keep.steps else there
        if keep.optimizer_states:
            last = len(there) - keep.optimizer_states
            there = [has and index >= last for index, has in enumerate(there)]
    return max(sizes) - sizes[0]


@pytest.mark.parametrize("steps", [None, 1, 2, 4])
@pytest.mark.parametrize("states", [None, 1, 2, 3])
def test_the_disk_that_a_run_needs_is_foreseen(steps: int | None, states: int | None) -> None:
    keep = RetentionPolicy(steps, states)
    for saves, kept in itertools.product(range(7), ((0, 0), (1, 1), (3, 1), (3, 3), (6, 2))):
        foreseen = keep.added_bytes(saves, present=kept, weights=4, state=8)
        needed = peak(saves, keep, kept)
        assert foreseen == needed if kept == (0, 0) else foreseen >= needed


def test_a_disk_that_does_not_let_latest_catch_up_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path, RetentionPolicy())
    full = OSError(28, "No space left on device")
    with patch("checkpoint.store.write_latest", side_effect=full):
        store.update_latest(4)
    assert f"{tmp_path / 'latest'} could not be changed to step 4: [Errno 28]" in caplog.text
    store.update_latest(4)
    assert (tmp_path / "latest").read_text() == "4"


def test_a_deletion_that_outlasts_a_save_is_caught_up_before_the_next(tmp_path: Path) -> None:
    """A deletion that had to wait for an earlier one starts when the next save begins."""
    store = make_store(tmp_path, RetentionPolicy(1))
    may_end, second_began = threading.Event(), threading.Event()

    def slowly(path: Path, step: int, *given: Any, **more: Any) -> None:
        if step == 2:
            second_began.set()
        assert may_end.wait(30.0)
        delete_old_steps(path, step, *given, **more)

    with patch("checkpoint.retention.delete_old_steps", slowly):
        save(store, 1, 2)
        assert not second_began.is_set(), "the first deletion still runs"
        may_end.set()
        deadline = time.monotonic() + 30.0
        while store._deleter.running is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        store.begin(step_meta(3), parts={"checkpoint": {}})
        assert second_began.wait(30.0)
        store.finish()
        store.finish_cleanup()
    assert steps_of(tmp_path) == ["3"]
