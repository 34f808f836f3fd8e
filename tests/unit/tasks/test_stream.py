"""Tests a run's training stream: the tokens do not depend on worker processes or restarts.

Each source's share of the blocks equals its weight, and every document comes once per epoch.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tasks.loader import BatchLoader
from tasks.mixture import BlockStream
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.data import (
    content,
    make_texts,
    through_json,
    tokenizer,
    write_folder,
    write_jsonl,
)

WEIGHTS = (0.2, 0.5, 0.3)
ROWS = 4
APART = {3, 4}  # parts of the run that are tokenized by a worker process


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SourceSpec]:
    """Makes a plain file, a folder of plain and compressed files, and a file of prompts."""
    folder = tmp_path_factory.mktemp("sources")
    pairs = [{"prompt": text, "completion": " dog"} for text in make_texts(70, seed=3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    paths = [
        write_jsonl(folder / "plain.jsonl", make_texts(90, seed=1)),
        write_folder(folder / "mixed", make_texts(80, seed=2)),
        folder / "pairs.jsonl",
    ]
    return [SourceSpec(str(p), weight) for p, weight in zip(paths, WEIGHTS, strict=True)]


def stream_of(sources: Sequence[SourceSpec], **options: Any) -> BlockStream:
    return open_training_stream(
        sources, tokenizer(), seq_len=24, seed=5, chunk_documents=16, **options
    )


@pytest.mark.parametrize(
    "way", [{}, {"pack": "document", "train_on": "completion", "separator": "\n"}]
)
def test_workers_change_no_token(sources: list[SourceSpec], way: dict[str, Any]) -> None:
    """Streams with 0 and with 3 worker processes give the same 900 blocks and states."""
    streams = [stream_of(sources, num_workers=workers, **way) for workers in (0, 3)]
    for number in range(900):
        alone, apart = (content(stream.next_block()) for stream in streams)
        assert alone == apart
        if number % 7 == 0:
            assert len({json.dumps(stream.state()) for stream in streams}) == 1
    for stream in streams:
        stream.close()
        stream.close()
    assert min(source["epoch"] for source in streams[0].state()["sources"]) >= 2


@pytest.mark.parametrize("way", [{"train_on": "completion"}, {"pack": "document"}])
def test_cut_at_ten_steps_it_is_the_same_stream(
    sources: list[SourceSpec], way: dict[str, Any]
) -> None:
    """A run of 120 steps has the same batches as one that is stopped and resumed 10 times.

    Some parts of the run use a worker process and some use none. A resume can therefore have one
    worker process more than the part before it, one less, or the same number.
    """
    loader = BatchLoader(stream_of(sources, **way), rows=ROWS)
    whole = [loader.next() for _ in range(120)]
    loader.close()
    cuts = sorted(random.Random(1).sample(range(1, 120), 10))
    state: dict[str, Any] | None = None
    for part, (start, end) in enumerate(pairwise([0, *cuts, 120])):
        stream = stream_of(sources, num_workers=int(part in APART), **way)
        if state is not None:
            stream.restore(through_json(state))
        resumed = BatchLoader(stream, rows=ROWS)
        for expected in whole[start:end]:
            batch = resumed.next()
            np.testing.assert_array_equal(batch.token_ids, expected.token_ids)
            np.testing.assert_array_equal(batch.labels, expected.labels)
            assert batch.documents == expected.documents
            assert through_json(batch.state) == through_json(expected.state)
            state = batch.state
        resumed.close()


def test_shares_are_the_weights(sources: list[SourceSpec]) -> None:
    """Each source's share of 3000 blocks is within 1% of its weight (594 to 606 for weight 0.2)."""
    stream = stream_of(sources)
    origins = [stream.next_block().documents[0] for _ in range(3000)]
    for spec, weight in zip(sources, WEIGHTS, strict=True):
        blocks = sum(origin.startswith(spec.name) for origin in origins)
        assert blocks / 3000 == pytest.approx(weight, rel=0.01)


def test_every_document_comes_once_an_epoch_in_another_order(sources: list[SourceSpec]) -> None:
    """In each of three epochs, every document comes once; the order differs between the epochs."""
    stream = stream_of(sources)
    orders: dict[str, list[str]] = {spec.name: [] for spec in sources}
    while min(source["epoch"] for source in stream.state()["sources"]) < 3:
        for origin in stream.next_block().documents:
            (name,) = (name for name in orders if origin.startswith(name))
            if not orders[name] or orders[name][-1] != origin:
                orders[name].append(origin)
    for name, size in zip(orders, (90, 80, 70), strict=True):
        epochs = [orders[name][start : start + size] for start in (0, size, 2 * size)]
        assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
        assert len(set(epochs[0])) == size
        assert len({tuple(epoch) for epoch in epochs}) == 3
