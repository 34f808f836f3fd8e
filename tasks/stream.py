"""The training stream put together from its parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from common.seeds import derive_seed
from common.text import shown
from tasks.mixture import BlockStream, Pack, StreamIdentity
from tasks.open import open_source
from tasks.packing.best_fit import DocumentSource
from tasks.packing.concat import ConcatenatedSource, PackedSource
from tasks.shuffled import Shuffled
from tasks.shuffling.buffered import CHUNK_DOCUMENTS, BufferedShuffle
from tasks.shuffling.full import FullShuffle
from tasks.source_spec import TASK_FLAG, SourceSpec
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import Source
from tasks.tokenization.encoder import Encoder, TrainOn
from tasks.tokenization.prefetch import EncodedDocuments
from tasks.tokenization.workers import Workers

logger = logging.getLogger(__name__)

PACKING: dict[Pack, type[PackedSource]] = {
    "concat": ConcatenatedSource,
    "document": DocumentSource,
}


def open_training_stream(
    specs: Sequence[SourceSpec],
    tokenizer: Any,
    *,
    seq_length: int,
    seed: int,
    separator: str | None = None,
    train_on: TrainOn = "all",
    pack: Pack = "concat",
    bad_lines: BadLines | None = None,
    num_workers: int = 0,
    chunk_documents: int = CHUNK_DOCUMENTS,
    flag: str = TASK_FLAG,
) -> BlockStream:
    """Opens the sources that `specs` name (see `tasks.source_spec.parse_task_name`).

    num_workers: processes that tokenize (see `tasks.tokenization.workers`); the blocks do not
    depend on it.

    Raises:
        ValueError: A source is not there, or there is neither eos_token nor `separator`.
    """
    workers = Workers(Encoder(tokenizer, separator, train_on), num_workers)
    sources = []
    for position, spec in enumerate(specs):
        documents = open_documents(
            open_source(spec.name, flag=flag),
            seed=derive_seed(seed, "source", position),  # one path given twice: two orders
            chunk_documents=chunk_documents,
            bad_lines=bad_lines,
        )
        encoded = EncodedDocuments(documents, workers, train_on)
        sources.append(PACKING[pack](encoded, seq_length))
    identity = StreamIdentity(tuple(specs), seq_length, separator, train_on, pack, seed)
    return BlockStream(sources, identity, on_close=workers.close)


def open_documents(
    source: Source,
    *,
    seed: int,
    chunk_documents: int = CHUNK_DOCUMENTS,
    bad_lines: BadLines | None = None,
) -> Shuffled:
    """In a true shuffle where the source can be read at any place, else in a buffered one."""
    if source.open_items is not None:
        return FullShuffle(source, seed=seed, bad_lines=bad_lines)
    logger.info(
        "%s: shuffled in chunks of up to %d documents, for it can be read in order alone",
        shown(source.name),
        chunk_documents,
    )
    return BufferedShuffle(source, seed=seed, chunk_documents=chunk_documents, bad_lines=bad_lines)
