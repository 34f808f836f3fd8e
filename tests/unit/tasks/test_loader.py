"""Tests the loader's thread: it makes batches with labels, passes errors on, and ends at close."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tasks.loader import BatchLoader
from tasks.mixture import BlockStream
from tasks.packing.blocks import TokenBlock, make_batch
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.data import make_texts, tokenizer, write_jsonl


def _stream(path: Path) -> BlockStream:
    specs = [SourceSpec(str(path))]
    return open_training_stream(specs, tokenizer(), seq_len=16, seed=1, chunk_documents=8)


def test_labels() -> None:
    trained = np.array([[True, True, False, True], [True, False, False, False]])
    tokens = np.array([[5, 6, 7, 8], [1, 2, 3, 4]])
    batch = make_batch([TokenBlock(*pair) for pair in zip(tokens, trained, strict=True)])
    assert batch.token_ids.tolist() == tokens.tolist()
    assert batch.labels.tolist() == [[6, -100, 8, -100], [-100] * 4]


def test_batches_are_the_streams_blocks(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40, seed=1))
    stream = _stream(path)
    loader = BatchLoader(_stream(path), rows=3)
    for _ in range(20):
        batch = loader.next()
        assert batch.token_ids.tolist() == [
            stream.next_block().token_ids.tolist() for _ in range(3)
        ]
        assert batch.labels[:, :-1].tolist() == batch.token_ids[:, 1:].tolist()
        assert (batch.labels[:, -1] == -100).all()
    loader.close()


def test_an_error_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(8, seed=1))
    with path.open("a") as file:
        file.write("nonsense\n")
    loader = BatchLoader(_stream(path), rows=200)
    for _ in range(2):  # the second call must not wait forever
        with pytest.raises(ValueError, match=r"a\.jsonl:9: not JSON"):
            loader.next()
    loader.close()


def test_close_ends_the_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # other tests' threads may end meanwhile
    loader = BatchLoader(_stream(write_jsonl(tmp_path / "a.jsonl", ["text"])), rows=2, depth=2)
    time.sleep(0.05)  # the queue is full, and the thread waits
    start = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - start < 1
    assert set(threading.enumerate()) <= before
