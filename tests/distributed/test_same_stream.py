"""Tests that the tokens of global batches do not depend on the shape or on data workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from comm.topology import Topology
from pipeline_parallel.batch_scatter import BatchPrefetcher, BatchScatter
from tasks.loader import BatchLoader
from tasks.mixture import BlockStream
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.cases import connected, meet_at
from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.launcher import run_ranks

SHAPES = [(2, 2), (1, 4), (4, 1)]
ROWS, TOKENS, BATCHES = 8, 24, 20

Taken = list[dict[str, np.ndarray]]


def stream_of(path: Path, workers: int) -> BlockStream:
    specs = [SourceSpec(str(path / "a.jsonl"), 0.4), SourceSpec(str(path / "b.jsonl.zst"), 0.6)]
    return open_training_stream(
        specs, tokenizer(), seq_len=TOKENS, seed=3, pack="document", num_workers=workers
    )


def take(
    rank: int, _world: int, _url: str, shapes: list[tuple[int, int, str]], path: Path
) -> list[Taken]:
    """Returns this rank's batches in each shape; the second half is from a restored data stream."""
    return [_take(Topology(rank, *shape), url, path) for *shape, url in shapes]


def _take(topology: Topology, url: str, path: Path) -> Taken:
    with connected(topology, url) as (groups, _):
        taken: Taken = []
        state = None
        for _ in range(2):
            loader = None
            if topology.rank == 0:
                stream = stream_of(path, workers=topology.num_stages - 1)
                if state is not None:
                    stream.restore(state)
                loader = BatchLoader(stream, rows=ROWS)
            scatter = BatchScatter(
                groups.control,
                topology,
                rows=ROWS // topology.num_replicas,
                seq_len=TOKENS,
                keeps_apart=True,
                device=torch.device("cpu"),
            )
            feed = BatchPrefetcher(scatter, loader, num_batches=BATCHES // 2)
            for _ in range(BATCHES // 2):
                rows = feed.next()
                taken.append({k: v.numpy() for k, v in rows._asdict().items() if v is not None})
            state = feed.state
            if loader is not None:
                loader.close()
    return taken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream")
    write_jsonl(path / "a.jsonl", make_texts(70, seed=1))
    write_jsonl(path / "b.jsonl.zst", make_texts(90, seed=2, longest=60))
    return path


def test_tokens_do_not_depend_on_the_shape(folder: Path) -> None:
    """In each shape, ranks get the batches of one process without workers or a restored stream."""
    loader = BatchLoader(stream_of(folder, workers=0), rows=ROWS)
    expected = [loader.next() for _ in range(BATCHES)]
    loader.close()
    by_rank = run_ranks(4, take, meet_at(SHAPES), folder, deadline=120.0)
    for number, (stages, replicas) in enumerate(SHAPES):
        for rank, shapes in enumerate(by_rank):
            topology = Topology(rank, stages, replicas)
            share = ROWS // replicas
            mine = slice(topology.replica * share, (topology.replica + 1) * share)
            assert len(shapes[number]) == BATCHES
            for batch, rows in zip(expected, shapes[number], strict=True):
                wanted = {"doc_starts": batch.doc_starts}
                wanted |= {"token_ids": batch.token_ids} if topology.stage == 0 else {}
                wanted |= {"labels": batch.labels} if topology.stage == stages - 1 else {}
                assert rows.keys() == wanted.keys()
                for name, array in wanted.items():
                    assert array is not None
                    np.testing.assert_array_equal(rows[name], array[mine])
