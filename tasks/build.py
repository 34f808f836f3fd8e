"""The training stream put together from its parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from tasks.bad_lines import BadLines
from tasks.documents import CHUNK_DOCUMENTS, Documents
from tasks.indexed_documents import IndexedDocuments
from tasks.mixture import BlockStream, StreamIdentity
from tasks.opening import open_source
from tasks.packing import Encoder, PackedSource, Shuffled, TrainOn
from tasks.registry import TASK_FLAG, SourceSpec, shown
from tasks.seeds import derive_seed
from tasks.source import Source

logger = logging.getLogger(__name__)


def open_training_stream(
    specs: Sequence[SourceSpec],
    tokenizer: Any,
    *,
    seq_length: int,
    seed: int,
    separator: str | None = None,
    train_on: TrainOn = "all",
    bad_lines: BadLines | None = None,
    chunk_documents: int = CHUNK_DOCUMENTS,
    flag: str = TASK_FLAG,
) -> BlockStream:
    """Opens the sources that `specs` name (see `tasks.registry.parse_task_name`).

    Raises:
        ValueError: A source is not there, or there is neither eos_token nor `separator`.
    """
    encoder = Encoder(tokenizer, separator, train_on)
    sources = []
    for position, spec in enumerate(specs):
        documents = open_documents(
            open_source(spec.name, flag=flag),
            seed=derive_seed(seed, "source", position),  # one path given twice: two orders
            chunk_documents=chunk_documents,
            bad_lines=bad_lines,
        )
        sources.append(PackedSource(documents, encoder, seq_length))
    return BlockStream(sources, StreamIdentity(tuple(specs), seq_length, separator, train_on, seed))


def open_documents(
    source: Source,
    *,
    seed: int,
    chunk_documents: int = CHUNK_DOCUMENTS,
    bad_lines: BadLines | None = None,
) -> Shuffled:
    """In a true shuffle where the source can be read at any place, else in a buffered one."""
    if source.open_items is not None:
        return IndexedDocuments(source, seed=seed, bad_lines=bad_lines)
    logger.info(
        "%s: shuffled in chunks of up to %d documents, for it can be read in order alone",
        shown(source.name), chunk_documents,
    )  # fmt: skip
    return Documents(source, seed=seed, chunk_documents=chunk_documents, bad_lines=bad_lines)
