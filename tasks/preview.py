"""What a run will train on, for a person to read: blocks as text, and the mixture in numbers."""

from __future__ import annotations

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
from tasks.packing.best_fit import pack_apart_once
from tasks.packing.blocks import TokenBlock
from tasks.packing.concat import pack_once
from tasks.shuffled import Shuffled
from tasks.sources.base import BadLineError, Source
from tasks.tokenization.encoder import Encoded, Encoder

SAMPLE = 2000  # documents of a source that are tokenized for the numbers
SAMPLE_TOKENS = 1 << 23  # fewer documents where they have more tokens than that
COUNTED_BLOCKS = 1024  # so many at least, for documents fall into blocks now thus and now so
COUNT_SECONDS = 30.0
GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"
# What would move a terminal's cursor, or colour what is not trained, is shown as it is written.
_CONTROLS = {
    code: ascii(chr(code))[1:-1]
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\t\n"
}


def preview_blocks(
    stream: BlockStream, tokenizer: Any, count: int, *, colour: bool
) -> Iterator[str]:
    """The first `count` blocks: where each document is from, and the text.

    What is trained is green and the rest grey; without `colour` the rest stands in [- -].
    """
    for number in range(1, count + 1):
        block = stream.next_block()
        padding = f", {block.padding} of padding" if block.padding else ""
        yield (
            f"block {number}: {len(block.tokens)} tokens, {int(block.predicted.sum())} trained"
            f"{padding}; from {', '.join(block.documents)}"
        )
        yield _text(block, tokenizer, colour)


def _text(block: TokenBlock, tokenizer: Any, colour: bool) -> str:
    text = slice(0, len(block.tokens) - block.padding)
    pairs = zip(block.predicted[text].tolist(), block.tokens[text].tolist(), strict=True)
    return "".join(
        _marked(tokenizer.decode([token for _, token in run]), is_trained, colour)
        for is_trained, run in itertools.groupby(pairs, key=lambda pair: pair[0])
    )


def _marked(text: str, is_trained: bool, colour: bool) -> str:
    text = text.translate(_CONTROLS)
    if colour:
        return f"{GREEN if is_trained else GREY}{text}{PLAIN}"
    return text if is_trained else f"[-{text}-]"


@dataclass(frozen=True)
class SourceNumbers:
    """A source as far as it was looked at: `documents` of it, with so many tokens.

    is_all: these are all that it has; else it has `lines`, or, `is_least`, more than that.
    blocks: that are made of them to train on, a part of one where that is all; what is padding, and
    blocks that train nothing and are passed over, are reckoned with.
    """

    name: str
    documents: int
    tokens: int
    trained: int
    is_all: bool
    lines: int
    blocks: float
    is_least: bool = False

    @property
    def of_all(self) -> float:
        """By how much the whole is larger than what was looked at, or is so at least."""
        return 1.0 if self.is_all or not self.documents else self.lines / self.documents


def look_at(
    documents: Shuffled,
    encoder: Encoder,
    *,
    seq_length: int,
    pack: Pack = "concat",
    sample: int = SAMPLE,
    count_seconds: float = COUNT_SECONDS,
) -> SourceNumbers:
    """Tokenizes up to `sample` documents of a source that nothing was taken from.

    Where nothing tells how many there are in all, they are counted, for `count_seconds`.
    """
    encoded, tokens = list[Encoded](), 0
    document = documents.next()
    while documents.epoch == 0 and len(encoded) < sample and tokens < SAMPLE_TOKENS:
        try:
            encoded.append(encoder.encode(document))
            tokens += len(encoded[-1].tokens)
        except BadLineError as error:
            documents.bad_lines.take(error, noted=True)
        document = documents.next()
    is_all, lines, is_counted = documents.epoch > 0, documents.num_lines, True
    if lines is None:
        lines, is_counted = (0, True) if is_all else _count(documents.source, count_seconds)
    return SourceNumbers(
        name=documents.source.name,
        documents=len(encoded),
        tokens=tokens,
        trained=sum(int(np.count_nonzero(one.trained)) for one in encoded),
        is_all=is_all,
        lines=lines,
        blocks=_count_blocks(encoded, tokens, seq_length, pack),
        is_least=not is_counted,
    )


def _count_blocks(encoded: Sequence[Encoded], tokens: int, seq_length: int, pack: Pack) -> float:
    """How many blocks an epoch of these documents makes that train any token.

    They are packed over and over, each time in another order, for COUNTED_BLOCKS at least.
    """
    times = math.ceil(COUNTED_BLOCKS * seq_length / tokens) if tokens else 1
    orders = (random.Random(number).sample(encoded, len(encoded)) for number in range(times))
    documents = itertools.chain.from_iterable(orders)
    if pack == "document":
        return sum(1 for _ in pack_apart_once(documents, seq_length)) / times
    packed = pack_once(documents, seq_length)
    return sum(1 - block.padding / seq_length for block in packed) / times


def _count(source: Source, seconds: float) -> tuple[int, bool]:
    """How many lines or rows were read in that time, and whether these are all."""
    end, lines = time.monotonic() + seconds, 0
    for file in source.files:
        for _ in file.read():
            lines += 1
            if time.monotonic() > end:
                return lines, False
    return lines, True


def describe_mixture(
    sources: Sequence[SourceNumbers], weights: Sequence[float], *, run_blocks: int
) -> str:
    """A line for each source; `run_blocks` are those of the whole run.

    What a sample says of the whole is marked with ~; > and < where the whole was not counted.
    """
    columns = {"share": 7, "documents": 13, "tokens": 15, "trained": 15, "epochs": 9}
    lines = ["".join(f"{name:>{width}s}" for name, width in columns.items()) + "  source"]
    for source, weight in zip(sources, weights, strict=True):
        scale = source.of_all
        more, less = (">", "<") if source.is_least else ("", "") if source.is_all else ("~", "~")
        numbers = (source.documents, source.tokens, source.trained)
        cells = [f"{more}{scale * number:,.0f}" for number in numbers]
        epochs = "?"
        if source.blocks:
            epochs = f"{less}{weight * run_blocks / (scale * source.blocks):.2f}"
        lines.append(
            f"{weight:7.1%}{cells[0]:>13s}{cells[1]:>15s}{cells[2]:>15s}{epochs:>9s}"
            f"  {shown(source.name)}"
        )
    return "\n".join(lines)
