"""The training stream, made of sources, their shuffles, an encoder, packers and a mixture."""

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
    """Opens the sources and returns their mixture as a stream of blocks.

    Args:
        specs: The sources and their weights (see `tasks.source_spec.parse_task_name`).
        tokenizer: A tokenizer of transformers.
        seq_len: The number of tokens in a block.
        seed: Determines the order of each source and the mixture.
        separator: The text before each document; None: the end-of-text token after each document.
        train_on: "all" trains on all tokens, "completion" only on answers.
        pack: "document" packs complete documents, and attention does not cross documents; "concat"
            fills every block.
        bad_lines: The policy for bad lines; None: a bad line is an error.
        num_workers: The number of processes that tokenize; it does not change the blocks.
        chunk_documents: The number of documents in a chunk of a buffered shuffle.

    Raises:
        ValueError: A source is missing, or there is no eos_token and no `separator`.
    """
    workers = Workers(Encoder(tokenizer, separator, train_on), num_workers)
    packers = []
    for index, spec in enumerate(specs):
        documents = shuffle_source(
            open_source(spec.name),
            seed=derive_seed(seed, "source", index),  # the same path given twice has two orders
            chunk_documents=chunk_documents,
            bad_lines=bad_lines,
        )
        prefetcher = DocumentPrefetcher(documents, workers, train_on)
        packers.append(PACKERS[pack](prefetcher, seq_len))
    identity = StreamIdentity(tuple(specs), seq_len, separator, train_on, pack, seed)
    return BlockStream(packers, identity, close=workers.close)
