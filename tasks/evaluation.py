"""Held-out text for evaluation: packed in order, once, padded at its end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tasks.evaluation_sets import EVALUATION_FLAG
from tasks.mixture import Pack
from tasks.open import open_source
from tasks.packing.best_fit import pack_apart_once
from tasks.packing.blocks import Batch, TokenBlock, empty_block, make_batch
from tasks.packing.concat import pack_once
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import BadLineError, Source
from tasks.tokenization.encoder import Encoded, Encoder, TrainOn

AT_ONCE = 64  # documents that are tokenized together


def evaluation_batches(
    name: str,
    tokenizer: Any,
    *,
    seq_length: int,
    rows: int,
    separator: str | None = None,
    train_on: TrainOn = "all",
    pack: Pack = "concat",
    bad_lines: BadLines | None = None,
    max_batches: int | None = None,
    flag: str = EVALUATION_FLAG,
) -> Iterator[Batch]:
    """The whole of a file, folder or registered task, `rows` blocks a batch; streams.

    What the last block lacks, and the rows that the last batch lacks, are token 0 and not trained.

    Raises:
        ValueError: There is no such source, it yields nothing to predict, or a line is bad.
    """
    source = open_source(name, flag=flag)
    encoder = Encoder(tokenizer, separator, train_on)
    packing = pack_apart_once if pack == "document" else pack_once
    blocks = packing(_encode_all(source, encoder, bad_lines or BadLines()), seq_length)
    return itertools.islice(_batches(source, blocks, rows), max_batches)


def _encode_all(source: Source, encoder: Encoder, bad_lines: BadLines) -> Iterator[Encoded]:
    records = (record.document for file in source.files for record in file.read())
    while some := list(itertools.islice(records, AT_ONCE)):
        good = [one for one in some if not isinstance(one, BadLineError)]
        encoded = iter(encoder.encode_all(good))
        for one in some:
            found = one if isinstance(one, BadLineError) else next(encoded)
            if isinstance(found, BadLineError):
                bad_lines.take(found)
            else:
                bad_lines.note_good()
                yield found


def _batches(source: Source, blocks: Iterator[TokenBlock], rows: int) -> Iterator[Batch]:
    batch = list(itertools.islice(blocks, rows))
    if not batch:
        raise source.empty_error("yields nothing to evaluate")
    while batch:
        yield make_batch(batch + [_untrained(batch[0])] * (rows - len(batch)))
        batch = list(itertools.islice(blocks, rows))


def _untrained(like: TokenBlock) -> TokenBlock:
    block = empty_block(len(like.tokens))
    return block if like.begins is None else replace(block, begins=np.zeros_like(like.begins))
