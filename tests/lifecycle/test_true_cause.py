"""A rank that fails and is slow to end: the others end for its reason, not for their waiting.

Two pipelines of two stages, whose ranks wait for each other for less than the slow one takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.flags import flags_of
from tests.support.hooks import Slow, find
from tests.support.launcher import free_port, run_ranks
from tests.support.models import make_hf
from tests.support.runs import Hook, Outcome, fork_ranks
from tests.support.valid_run import argv

WORLD, TIMEOUT, SLOW = 4, 5, 8.5
Start = tuple[list[list[str]], Path, list[Hook]]


@dataclass(frozen=True)
class Short:
    """A rank whose memory runs out in the third call of `target`."""

    rank: int
    target: str

    def arm(self) -> None:
        owner, name = find(self.target)
        original, calls = getattr(owner, name), iter(range(1000))

        def armed(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 2:
                raise torch.OutOfMemoryError
            return original(*args, **kwargs)

        setattr(owner, name, armed)


def outcomes_of(_rank: int, _world: int, _url: str, starts: Sequence[Start]) -> list[Outcome]:
    return [fork_ranks(argvs, folder, hooks=armed) for argvs, folder, armed in starts]


def start(home: Path, name: str, changes: dict[str, Any], *armed: Hook) -> Start:
    folder = home / name
    folder.mkdir()
    common = flags_of(f"""
        --model-name {home}/model --load-pretrained-model false --model-type gptneox
        --num-layers auto --embedding-dim 32 --task-name {home}/data.jsonl --seq-length 24
        --batch-size 2 --total-steps 400 --world-size {WORLD} --pipeline-group-size 2
        --data-group-size 2 --data-workers 0 --dist-timeout {TIMEOUT}
        --dist-url tcp://127.0.0.1:{free_port()} --checkpoint-path {folder}/run
    """)
    argvs = [argv(common | changes | {"rank": rank}) for rank in range(WORLD)]
    return argvs, folder, list(armed)


@pytest.mark.slow
def test_the_others_end_for_the_reason_of_one_that_is_slow_to_end(tmp_path: Path) -> None:
    make_hf("gptneox", vocab_size=400, num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "data.jsonl", make_texts(60, seed=1))
    bad = tmp_path / "bad.jsonl"
    bad.write_text((tmp_path / "data.jsonl").read_text() + "nonsense\n")
    closes = Slow(0, "monitor.recorder:FileRecorder.close", SLOW)
    explains = Slow(3, "planning.memory.out_of_memory:helpful_changes", SLOW)
    short_of = Short(3, "pipeline_parallel.engine:Engine.train")
    starts = [
        start(tmp_path, "bad", {"task-name": bad}, closes),
        start(tmp_path, "short", {}, short_of, explains),
    ]
    (outcomes,) = run_ranks(1, outcomes_of, starts, deadline=150.0)
    bad_line, short = outcomes
    check_all_say(bad_line, 2, f"rank 0: {bad}:61", culprit=0)
    check_all_say(short, 1, "rank 3: stage 1, between microbatches: out of memory; by", culprit=3)
    assert all("; what helps, most first: --" in line for (line,) in short.lines)


def check_all_say(outcome: Outcome, status: int, words: str, *, culprit: int) -> None:
    assert outcome.statuses == [status] * WORLD
    for rank, lines in enumerate(outcome.lines):
        (line,) = lines
        assert line.removeprefix("" if rank == culprit else f"rank {rank}: ").startswith(words)
