"""A preview of the training data: blocks as text, and the mixture in numbers."""

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.text import shown
from tasks.mixture import BlockStream, Pack
from tasks.packing.best_fit import pack_best_fit
from tasks.packing.blocks import TokenBlock
from tasks.packing.concat import pack_concat
from tasks.shuffling.shuffle import Shuffle
from tasks.sources.base import BadLineError, DataSource
from tasks.tokenization.encoder import EncodedDocument, Encoder

SAMPLE_DOCUMENTS = 2000  # documents of a source in the sample, at most
SAMPLE_TOKENS = 1 << 23  # tokens of a sample, at most
# A sample is packed in several orders into this many blocks, because the order changes the number.
MIN_BLOCKS = 1024
COUNT_SECONDS = 30.0
GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"
# Control characters are escaped, because they could move a terminal's cursor or change its colour.
_ESCAPED = {
    code: ascii(chr(code))[1:-1]
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\t\n"
}


def preview_blocks(
    stream: BlockStream, tokenizer: Any, count: int, *, colour: bool
) -> Iterator[str]:
    """Yields two texts for each of the next `count` blocks: a summary, and the block itself.

    The summary has the origin ("file:line") of each document. With `colour`, trained text is green,
    and other text is grey. Without `colour`, text that is not trained is between [- and -].
    """
    for number in range(1, count + 1):
        block = stream.next_block()
        padding = f", {block.padding} of padding" if block.padding else ""
        yield (
            f"block {number}: {len(block.token_ids)} tokens, {int(block.predicted.sum())} trained"
            f"{padding}; from {', '.join(block.documents)}"
        )
        yield _decode(block, tokenizer, colour)


def _decode(block: TokenBlock, tokenizer: Any, colour: bool) -> str:
    length = len(block.token_ids) - block.padding
    is_trained, token_ids = block.predicted[:length].tolist(), block.token_ids[:length].tolist()
    runs = itertools.groupby(zip(is_trained, token_ids, strict=True), key=lambda pair: pair[0])
    return "".join(
        _mark(tokenizer.decode([token_id for _, token_id in run]), run_is_trained, colour)
        for run_is_trained, run in runs
    )


def _mark(text: str, is_trained: bool, colour: bool) -> str:
    text = text.translate(_ESCAPED)
    if colour:
        return f"{GREEN if is_trained else GREY}{text}{PLAIN}"
    return text if is_trained else f"[-{text}-]"


@dataclass(frozen=True)
class SourceSample:
    """The numbers of documents, tokens and blocks in a sample of a source.

    num_documents, num_tokens, num_trained_tokens: the numbers in the sample.
    num_blocks: how many blocks one epoch of the sample fills, as a mean over several orders of its
        documents; a block without a trained token is not counted.
    is_complete: whether the sample contains the complete source.
    num_rows: if the sample is not complete, the number of rows that were counted in the source.
    has_more_rows: whether the source has more rows than were counted.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_trained_tokens: int
    num_blocks: float
    is_complete: bool
    num_rows: int
    has_more_rows: bool = False

    @property
    def scale(self) -> float:
        """The ratio of the source's size to the sample's size; a lower bound if has_more_rows."""
        if self.is_complete or not self.num_documents:
            return 1.0
        return self.num_rows / self.num_documents


def sample_source(
    documents: Shuffle,
    encoder: Encoder,
    *,
    seq_len: int,
    pack: Pack = "concat",
    max_documents: int = SAMPLE_DOCUMENTS,
    count_seconds: float = COUNT_SECONDS,
) -> SourceSample:
    """Tokenizes the first documents of a source and counts documents, tokens and blocks.

    Args:
        documents: The shuffled source, from which no document has been read.
        encoder: Tokenizes the sample.
        seq_len: The number of tokens in a block.
        pack: "document" packs complete documents; "concat" fills every block.
        max_documents: The largest number of documents in the sample.
        count_seconds: The time limit for counting the rows of a source without an index.
    """
    encoded, num_tokens = list[EncodedDocument](), 0
    document = documents.next()
    while documents.epoch == 0 and len(encoded) < max_documents and num_tokens < SAMPLE_TOKENS:
        try:
            encoded.append(encoder.encode(document))
            num_tokens += len(encoded[-1].token_ids)
        except BadLineError as error:
            documents.bad_lines.skip(error, is_counted=True)
        document = documents.next()
    is_complete, num_rows, is_counted = documents.epoch > 0, documents.num_rows or 0, True
    if documents.num_rows is None and not is_complete:
        num_rows, is_counted = _count_rows(documents.source, count_seconds)
    return SourceSample(
        name=documents.source.name,
        num_documents=len(encoded),
        num_tokens=num_tokens,
        num_trained_tokens=sum(int(np.count_nonzero(item.trained)) for item in encoded),
        num_blocks=_count_blocks(encoded, num_tokens, seq_len, pack),
        is_complete=is_complete,
        num_rows=num_rows,
        has_more_rows=not is_counted,
    )


def _count_blocks(
    encoded: Sequence[EncodedDocument], num_tokens: int, seq_len: int, pack: Pack
) -> float:
    """Returns how many blocks one epoch of the documents fills, as a mean over several orders.

    The documents are packed several times, in different orders, into at least MIN_BLOCKS blocks. A
    block without a trained token is not counted.
    """
    repeats = math.ceil(MIN_BLOCKS * seq_len / num_tokens) if num_tokens else 1
    orders = (random.Random(seed).sample(encoded, len(encoded)) for seed in range(repeats))
    documents = itertools.chain.from_iterable(orders)
    if pack == "document":
        return sum(1 for _ in pack_best_fit(documents, seq_len)) / repeats
    blocks = pack_concat(documents, seq_len)
    return sum(1 - block.padding / seq_len for block in blocks) / repeats


def _count_rows(source: DataSource, seconds: float) -> tuple[int, bool]:
    """Returns the number of rows counted within `seconds`, and whether all rows were counted."""
    end, num_rows = time.monotonic() + seconds, 0
    for num_rows, _ in enumerate((row for file in source.files for row in file.read()), start=1):
        if time.monotonic() > end:
            return num_rows, False
    return num_rows, True


def describe_mixture(
    samples: Sequence[SourceSample], weights: Sequence[float], *, run_blocks: int
) -> str:
    """Returns a table with a line for each source; `run_blocks` is the run's number of blocks.

    The mark ~ means: estimated from a sample. If not all rows were counted, > marks a lower bound
    and < an upper bound.
    """
    columns = {"share": 7, "documents": 13, "tokens": 15, "trained": 15, "epochs": 9}
    lines = ["".join(f"{name:>{width}s}" for name, width in columns.items()) + "  source"]
    for sample, weight in zip(samples, weights, strict=True):
        more, less = (">", "<") if sample.has_more_rows else ("~", "~")
        if sample.is_complete:
            more = less = ""
        numbers = (sample.num_documents, sample.num_tokens, sample.num_trained_tokens)
        cells = [f"{weight:.1%}", *(f"{more}{sample.scale * number:,.0f}" for number in numbers)]
        epochs = "?"
        if sample.num_blocks:
            epochs = f"{less}{weight * run_blocks / (sample.scale * sample.num_blocks):.2f}"
        row = "".join(map(str.rjust, [*cells, epochs], columns.values()))
        lines.append(f"{row}  {shown(sample.name)}")
    return "\n".join(lines)
