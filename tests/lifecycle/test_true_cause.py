"""Tests that, if a rank fails and exits slowly, the other ranks report its error, not a timeout.

The run has two pipelines of two stages; the slow exit takes longer than --dist-timeout.
"""

from pathlib import Path

import pytest

from tests.support.cases import to_argv
from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.flags import flags_of
from tests.support.hooks import Slow
from tests.support.launcher import free_port
from tests.support.models import make_hf
from tests.support.runs import fork_ranks

WORLD, TIMEOUT, SLOW = 4, 5, 8.5


@pytest.mark.slow
def test_the_others_end_for_the_reason_of_one_that_is_slow_to_end(tmp_path: Path) -> None:
    make_hf("gptneox", vocab_size=400, num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    bad = write_jsonl(tmp_path / "bad.jsonl", make_texts(60, seed=1))
    bad.write_text(bad.read_text() + "nonsense\n")
    flags = flags_of(f"""
        --model-name {tmp_path}/model --load-pretrained-model false --model-type gptneox
        --num-layers auto --embedding-dim 32 --task-name {bad} --seq-length 24 --batch-size 2
        --total-steps 400 --world-size {WORLD} --pipeline-group-size 2 --data-group-size 2
        --data-workers 0 --dist-timeout {TIMEOUT} --dist-url tcp://127.0.0.1:{free_port()}
        --checkpoint-path {tmp_path}/run
    """)
    argvs = [to_argv(flags | {"rank": rank}) for rank in range(WORLD)]
    closes = Slow(0, "monitor.recorder:FileRecorder.close", SLOW)
    outcome = fork_ranks(argvs, tmp_path, hooks=[closes])
    assert outcome.statuses == [2] * WORLD
    for rank, (line,) in enumerate(outcome.lines):
        prefix = f"rank {rank}: rank 0: " if rank else "rank 0: "
        assert line.startswith(f"{prefix}{bad}:61"), outcome.lines
