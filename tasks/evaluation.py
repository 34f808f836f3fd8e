"""Batches of held-out text: each document is read once, in order; padding fills the last batch."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tasks.evaluation_sets import EVALUATION_FLAG
from tasks.mixture import Pack
from tasks.open import open_source
from tasks.packing.best_fit import pack_best_fit
from tasks.packing.blocks import TokenBatch, TokenBlock, empty_block, make_batch
from tasks.packing.concat import pack_concat
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import BadLineError, DataSource
from tasks.tokenization.encoder import EncodedDocument, Encoder, TrainOn

ENCODED_AT_ONCE = 64  # documents


def evaluation_batches(
    name: str,
    tokenizer: Any,
    *,
    seq_len: int,
    rows: int,
    separator: str | None = None,
    train_on: TrainOn = "all",
    pack: Pack = "concat",
    bad_lines: BadLines | None = None,
    max_batches: int | None = None,
) -> Iterator[TokenBatch]:
    """Yields the tokens of a source in batches; padding tokens are 0 and do not count in the loss.

    Args:
        name: A file, folder, registered task or data set on the hub.
        tokenizer: A tokenizer of transformers.
        seq_len: The number of tokens in a block.
        rows: The number of blocks in a batch; padding fills the last batch.
        separator, train_on, pack, bad_lines: As for `tasks.stream.open_training_stream`.
        max_batches: The largest number of batches; None: no limit.

    Raises:
        ValueError: The source does not exist, has no token to predict, or has a bad line.
    """
    source = open_source(name, flag=EVALUATION_FLAG)
    encoder = Encoder(tokenizer, separator, train_on)
    pack_once = pack_best_fit if pack == "document" else pack_concat
    blocks = pack_once(_encode(source, encoder, bad_lines or BadLines()), seq_len)
    return itertools.islice(_make_batches(source, blocks, rows), max_batches)


def _encode(source: DataSource, encoder: Encoder, bad_lines: BadLines) -> Iterator[EncodedDocument]:
    records = (record.document for file in source.files for record in file.read())
    while items := list(itertools.islice(records, ENCODED_AT_ONCE)):
        for result in encoder.encode_all(items):
            if isinstance(result, BadLineError):
                bad_lines.skip(result)
            else:
                bad_lines.note_good()
                yield result


def _make_batches(
    source: DataSource, blocks: Iterator[TokenBlock], rows: int
) -> Iterator[TokenBatch]:
    batch = list(itertools.islice(blocks, rows))
    if not batch:
        raise source.error("yields nothing to evaluate")
    while batch:
        yield make_batch(batch + [_padding_like(batch[0])] * (rows - len(batch)))
        batch = list(itertools.islice(blocks, rows))


def _padding_like(block: TokenBlock) -> TokenBlock:
    doc_starts = None if block.doc_starts is None else np.zeros_like(block.doc_starts)
    return replace(empty_block(len(block.token_ids)), doc_starts=doc_starts)
