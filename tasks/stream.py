"""Opens the training stream: sources, shuffles, encoder, packers and mixture."""

from collections.abc import Sequence
from typing import Any

from common.seeds import derive_seed
from tasks.mixture import BlockStream, Pack, StreamIdentity
from tasks.open import open_source
from tasks.packing.best_fit import BestFitPacker
from tasks.packing.concat import ConcatPacker, Packer
from tasks.shuffling.buffered import CHUNK_DOCUMENTS
from tasks.shuffling.shuffle import shuffle_source
from tasks.source_spec import SourceSpec
from tasks.sources.bad_lines import BadLines
from tasks.tokenization.encoder import Encoder, TrainOn
from tasks.tokenization.prefetch import DocumentPrefetcher
from tasks.tokenization.workers import Workers

PACKERS: dict[Pack, type[Packer]] = {"concat": ConcatPacker, "document": BestFitPacker}


def open_training_stream(
    specs: Sequence[SourceSpec],
    tokenizer: Any,
    *,
    seq_len: int,
    seed: int,
    separator: str | None = None,
    train_on: TrainOn = "all",
    pack: Pack = "concat",
    bad_lines: BadLines | None = None,
    num_workers: int = 0,
    chunk_documents: int = CHUNK_DOCUMENTS,
) -> BlockStream:
    """Opens the sources of a mixture (see `tasks.source_spec.parse_task_name`).

    Args:
        specs: The sources and their weights.
        tokenizer: One of transformers.
        seq_len: Tokens of a block.
        seed: Determines all orders and the mixture.
        separator: Text before each document; None: the end-of-text token after it.
        train_on: The tokens to train on.
        pack: Whether blocks keep documents apart ("document").
        bad_lines: Skips lines that are no document; None: they are errors.
        num_workers: Processes that tokenize; the blocks do not depend on it.
        chunk_documents: Documents of a chunk, where the shuffle is buffered.

    Raises:
        ValueError: A source is missing, or there is neither eos_token nor `separator`.
    """
    workers = Workers(Encoder(tokenizer, separator, train_on), num_workers)
    packers = []
    for index, spec in enumerate(specs):
        documents = shuffle_source(
            open_source(spec.name),
            seed=derive_seed(seed, "source", index),  # a path that is given twice has two orders
            chunk_documents=chunk_documents,
            bad_lines=bad_lines,
        )
        prefetcher = DocumentPrefetcher(documents, workers, train_on)
        packers.append(PACKERS[pack](prefetcher, seq_len))
    identity = StreamIdentity(tuple(specs), seq_len, separator, train_on, pack, seed)
    return BlockStream(packers, identity, close=workers.close)
