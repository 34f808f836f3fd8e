"""The training stream put together from its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.documents import CHUNK_BYTES, CHUNK_DOCUMENTS, Documents
from tasks.mixture import BlockStream, StreamIdentity
from tasks.opening import open_source
from tasks.packing import Encoder, PackedSource, TrainOn
from tasks.registry import TASK_FLAG, SourceSpec
from tasks.seeds import derive_seed


def open_training_stream(
    specs: Sequence[SourceSpec],
    tokenizer: Any,
    *,
    seq_length: int,
    seed: int,
    separator: str | None = None,
    train_on: TrainOn = "all",
    chunk_documents: int = CHUNK_DOCUMENTS,
    chunk_bytes: int = CHUNK_BYTES,
    flag: str = TASK_FLAG,
) -> BlockStream:
    """Opens the sources that `specs` name (see `tasks.registry.parse_task_name`).

    Raises:
        ValueError: A source is not there, or there is neither eos_token nor `separator`.
    """
    encoder = Encoder(tokenizer, separator, train_on)
    sources = []
    for position, spec in enumerate(specs):
        documents = Documents(
            open_source(spec.name, flag=flag),
            seed=derive_seed(seed, "source", position),  # one path given twice: two orders
            chunk_documents=chunk_documents,
            chunk_bytes=chunk_bytes,
        )
        sources.append(PackedSource(documents, encoder, seq_length))
    return BlockStream(sources, StreamIdentity(tuple(specs), seq_length, separator, train_on, seed))
