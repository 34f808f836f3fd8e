"""Tests that training continues after a failed save, with a warning and without the checkpoint.

In some tests, the operating system refuses to write a checkpoint, because the test limits the size
of the files that a rank writes. One test fills a small disk, if it has permission to mount one.
"""

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from comm.topology import Topology
from monitor.metrics import IterationMetrics, MetricsFile, read_metrics
from monitor.recorder import Recorder
from tests.support.cases import Case, Told, curve, meet_at, run_folder, to_argv, train_cases
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.full_disk import files_no_larger_than, fill, small_disk
from tests.support.hooks import Slow, no_picture, slowed
from tests.support.kill_lab import leftovers, same, state
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from tests.support.runs import Attendant, Hook, Rank, Run, run, run_all
from training.iteration import TrainingStoppedError
from training.trainer import Trainer

STEPS, EVERY = 8, 2
FOLDER = "checkpoint.steps.folder"
SMALL_FILES = 5000  # bytes; enough for the manifest and meta.json, not for weights


@dataclass(frozen=True)
class Fails:
    """A hook that makes some calls of a module's function fail on `rank`; `nth` has their numbers.

    Such a call does its work and then raises an error. With `limit`, it fails during its work,
    because a file can have at most `limit` bytes.
    """

    rank: int
    module: str
    name: str
    nth: tuple[int, ...]
    limit: int | None = None

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        module, calls = importlib.import_module(self.module), [0]
        original = getattr(module, self.name)

        def failing(*args: Any) -> Any:
            calls[0] += 1
            if topology.rank != self.rank or calls[0] not in self.nth:
                return original(*args)
            if self.limit is None:
                original(*args)
                raise PermissionError(13, "no permission any more", str(args[0]))
            with files_no_larger_than(self.limit):
                return original(*args)

        with patch.object(module, self.name, failing):
            yield


def slow_disk(_topology: Topology) -> AbstractContextManager[object]:
    """Slows the write of a stage's files, so that it still runs when the next save is due."""
    return slowed(f"{FOLDER}:write_stage_files", 0.5)


SEEN = "seen.json"


@contextmanager
def no_room_for_a_line(_topology: Topology) -> Iterator[None]:
    """Makes the first write of step 2's metrics line fail; a checkpoint is saved after this step.

    Before a checkpoint's folder is renamed, the hook notes which steps have a metrics line.
    """
    append, publish = MetricsFile.append, importlib.import_module(FOLDER).publish
    refused: list[int] = []

    def append_later(file: MetricsFile, *lines: IterationMetrics) -> None:
        if not refused and lines[-1].step == EVERY:
            refused.append(EVERY)
            raise OSError(28, "No space left on device")
        append(file, *lines)

    def note(partial: Path, final: Path) -> None:
        seen = [line["step"] for line in read_metrics(final.parent / "metrics.jsonl")]
        (final.parent / SEEN).open("a").write(f"{json.dumps([int(final.name), seen])}\n")
        publish(partial, final)

    with patch.object(MetricsFile, "append", append_later), patch(f"{FOLDER}.publish", note):
        yield


def full_disk(rank: int, *nth: int) -> Fails:
    return Fails(rank, FOLDER, "write_stage_files", nth, limit=SMALL_FILES)


def not_renamed(rank: int) -> Fails:
    return Fails(rank, FOLDER, "publish", (2,))


@dataclass(frozen=True)
class Story:
    """A failed save, whether it ends the run, and the steps whose checkpoints exist at the end."""

    fails: Fails
    steps: list[int]
    words: str
    flags: dict[str, Any]
    stops: bool = False
    latest: int = STEPS


LATE = flags_of(f"--checkpoint-steps {EVERY}")
BESIDE = LATE | flags_of("--async-checkpoint")
ONE = LATE | flags_of("--keep-checkpoints 1")  # the last complete step must stay
FATAL = ONE | flags_of("--checkpoint-failure fatal")
STORIES = {
    "a full disk": Story(full_disk(1, 1, 3), [4, 8], "is not saved: rank 1 on", LATE),
    "a full disk of rank 0": Story(full_disk(0, 2), [2, 6, 8], "is not saved: rank 0 on", LATE),
    "no renaming": Story(not_renamed(1), [2, 6, 8], "is not saved: rank 1 on", LATE),
    "no latest": Story(
        Fails(1, "checkpoint.store", "write_latest", (2,)),
        [2, 4, 6, 8],
        "is saved, but latest does not name it: rank 1 on",
        LATE,
    ),
    "the last save": Story(
        full_disk(1, 4), [6], "step 8 is not saved: rank 1 on", ONE, stops=True, latest=6
    ),
    "a full disk beside training": Story(
        full_disk(1, 1, 3), [4, 8], "is not saved: rank 1 on", BESIDE
    ),
    "no renaming beside training": Story(
        not_renamed(0), [2, 6, 8], "is not saved: rank 0 on", BESIDE
    ),
    "fatal": Story(full_disk(1, 2), [2], "step 4 is not saved: rank 1 on", FATAL, True, latest=2),
}


@dataclass(frozen=True)
class Ended:
    folder: Path
    told: list[dict[str, Told]]

    def run(self, name: str) -> Path:
        return run_folder(self.folder, name, 2, 1)


def make_flags(folder: Path) -> dict[str, Any]:
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": 3})
    return flags_of(f"""
        --model-name {folder}/shards/model --model-type gptneox --embedding-dim 32 --num-layers 2
        --task-name {folder}/a.jsonl --seq-length 16 --batch-size 2 --total-steps {STEPS}
        --lr 1e-3 --use-cuda false --recompute false
    """)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("failed")
    flags = make_flags(folder)
    cases = [
        Case(name, flags | story.flags, story.fails, stops=story.stops)
        for name, story in STORIES.items()
    ]
    cases.append(Case("whole", flags | LATE))
    cases.append(Case("beside", flags | BESIDE, slow_disk))
    cases.append(Case("a line", flags | LATE, no_room_for_a_line))
    return Ended(folder, run_ranks(2, train_cases, meet_at([(2, 1)]), cases, folder))


@pytest.mark.parametrize("name", STORIES)
def test_the_steps_that_could_be_saved_are_there_and_nothing_else(name: str, ended: Ended) -> None:
    run, story = ended.run(name), STORIES[name]
    assert sorted(int(entry.name) for entry in run.iterdir() if entry.is_dir()) == story.steps
    assert (run / "latest").read_text() == str(story.latest)
    assert leftovers(run) == []


@pytest.mark.parametrize("name", STORIES)
def test_rank_0_says_what_failed_and_where(name: str, ended: Ended) -> None:
    """Only rank 0 logs a failed save; if the failure ends the run, every rank reports it."""
    story, told = STORIES[name], [told[ended.run(name).name] for told in ended.told]
    if story.stops:
        assert all(one.stopped is not None and story.words in one.stopped for one in told)
        return
    failures = [line for line in told[0].lines if story.words in line]
    assert len(failures) == len(story.fails.nth)
    assert all("training continues" in line for line in failures)
    assert not any(story.words in line for line in told[1].lines)


@pytest.mark.parametrize("name", [name for name, story in STORIES.items() if not story.stops])
def test_the_curve_and_the_weights_are_those_of_an_undisturbed_run(name: str, ended: Ended) -> None:
    for key in ("loss", "grad_norm"):
        assert curve(ended.folder, name, 2, 1, key) == curve(ended.folder, "whole", 2, 1, key)
    for stage in range(2):
        assert same(state(ended.run(name), stage, STEPS), state(ended.run("whole"), stage, STEPS))


def test_what_is_written_beside_training_is_what_training_had(ended: Ended) -> None:
    """A checkpoint of --async-checkpoint has the weights of its step, though training goes on."""
    for step in range(EVERY, STEPS + 1, EVERY):
        for stage in range(2):
            beside, whole = (state(ended.run(name), stage, step) for name in ("beside", "whole"))
            assert same(beside, whole)
    paths = [ended.run(name) / str(EVERY) / "meta.json" for name in ("beside", "whole")]
    metas = [json.loads(path.read_text()) for path in paths]
    assert metas[0]["data"] == metas[1]["data"]
    assert curve(ended.folder, "beside", 2, 1) == curve(ended.folder, "whole", 2, 1)
    told = [told[ended.run("beside").name].lines for told in ended.told]
    saved = [line.split()[2] for line in told[0] if line.startswith("saved step")]
    assert saved == ["2", "4", "6", "8"]


def test_a_refused_write_names_the_file(ended: Ended) -> None:
    lines = ended.told[0][ended.run("a full disk").name].lines
    (line, *_) = [line for line in lines if "is not saved" in line]
    assert "File too large" in line
    assert "prank_1_checkpoint.pt" in line


def test_a_step_is_not_saved_before_its_line_is_written(ended: Ended) -> None:
    """A step's metrics line is written before its checkpoint.

    Otherwise a crash between the two would lose the line, since a resume does not repeat the step.
    """
    notes = [json.loads(line) for line in (ended.run("a line") / SEEN).read_text().splitlines()]
    assert {step for step, _ in notes} == set(range(EVERY, STEPS + 1, EVERY))
    for step, seen in notes:
        assert seen[:step] == list(range(1, step + 1))


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_that_fails_does_not_hide_why_training_stopped(fails: bool) -> None:
    """If an error stops training, a pending save goes on; if the save fails, its error is added."""

    class Pending:
        is_pending, is_writing = True, True

        def save(self, step: int, data: object, *, is_last: bool) -> bool:
            raise AssertionError("no step may be saved now")

        def finish(self, *, is_last: bool = False) -> bool:
            assert is_last, "training does not continue"
            self.is_pending = False
            if fails:
                raise OSError("step 2 is not saved: the disk is full")
            return True

        def close(self) -> None:
            """Does nothing; the real method deletes old checkpoints, and this test has none."""

    class Stopped(Trainer):
        def __init__(self, saver: Any) -> None:
            self._saver, self._recorder = saver, Recorder()

    saves = Pending()
    with pytest.raises(TrainingStoppedError) as caught:
        Stopped(saves).finish_after(TrainingStoppedError("step 3: the loss is not finite"))
    more = "; and step 2 is not saved: the disk is full" if fails else ""
    assert str(caught.value) == f"step 3: the loss is not finite{more}"
    assert not saves.is_pending


def test_a_disk_that_is_full_for_the_rest_of_the_run(tmp_path: Path) -> None:
    """Training continues on the full disk; the run exits with 1, because its last save fails.

    A restart completes the run after the disk has free space again.
    """
    changes = "--num-layers 3 --total-steps 30 --checkpoint-steps 10 --data-workers 0"
    flags = make_flags(tmp_path) | flags_of(changes)
    steps = Slow(0, "pipeline_parallel.engine:Engine.train", 0.03)  # so the disk fills first
    disk, path = tmp_path / "disk" / "run", tmp_path / "disk" / "filler"

    def fill_after_a_save(_pids: Sequence[int], _ended: Mapping[int, int | None]) -> None:
        if (disk / "latest").exists() and not path.exists():
            fill(path)

    def start(name: str, folder: Path, attend: Attendant | None = None, *hooks: Hook) -> Run:
        argv = to_argv({**flags, "checkpoint-path": folder})
        return Run(name, [Rank(argv, tmp_path, hooks=[no_picture, *hooks])], attend)

    with small_disk(tmp_path / "disk", "3m"):
        (first,) = run(start("first", disk, fill_after_a_save, steps))
        assert first.status == 1, first
        assert "step 20 is not saved: [Errno 28] No space left on device" in first.stdout
        assert "metrics.jsonl: [Errno 28] No space left on device" in first.stdout
        assert first.stderr.startswith("step 30 is not saved: [Errno 28] No space left on device")
        assert first.stderr.count("\n") == 1
        assert (disk / "latest").read_text() == "10"
        assert leftovers(disk) == []
        path.unlink()
        whole = tmp_path / "whole"
        outcomes = run_all([[start("again", disk)], [start("whole", whole)]], at_once=2)
        for outcome in outcomes.values():
            assert (outcome.statuses, outcome.lines) == ([0], [[]])
        lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (disk, whole))
        assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
        assert same(state(disk, 0, 30), state(whole, 0, 30))
