"""What a run will train on, for a person to read: blocks as text, and the mixture in numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tasks.block import Block
from tasks.document_packing import filled_share
from tasks.encoding import Encoded, Encoder
from tasks.mixture import BlockStream, Pack
from tasks.registry import shown
from tasks.shuffled import Shuffled
from tasks.source import BadLineError, Source

SAMPLE = 2000  # documents of a source that are tokenized for the numbers
COUNT_SECONDS = 30.0
GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


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


def _text(block: Block, tokenizer: Any, colour: bool) -> str:
    text = slice(0, len(block.tokens) - block.padding)
    pairs = zip(block.predicted[text].tolist(), block.tokens[text].tolist(), strict=True)
    return "".join(
        _marked(tokenizer.decode([token for _, token in run]), is_trained, colour)
        for is_trained, run in groupby(pairs, key=lambda pair: pair[0])
    )


def _marked(text: str, is_trained: bool, colour: bool) -> str:
    if colour:
        return f"{GREEN if is_trained else GREY}{text}{PLAIN}"
    return text if is_trained else f"[-{text}-]"


@dataclass(frozen=True)
class SourceNumbers:
    """A source as far as it was looked at: `documents` of it, with so many tokens.

    is_all: these are all that it has; else it has `lines`, or, `is_least`, more than that.
    filled: the share of its blocks' tokens that are documents', the rest being padding.
    """

    name: str
    documents: int
    tokens: int
    trained: int
    is_all: bool
    lines: int
    is_least: bool = False
    filled: float = 1.0

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
    encoded: list[Encoded] = []
    document = documents.next()
    while documents.epoch == 0 and len(encoded) < sample:
        try:
            encoded.append(encoder.encode(document))
        except BadLineError as error:
            documents.bad_lines.take(error, noted=True)
        document = documents.next()
    lengths = [len(one.tokens) for one in encoded]
    is_all, lines, is_counted = documents.epoch > 0, documents.num_lines, True
    if lines is None:
        lines, is_counted = (0, True) if is_all else _count(documents.source, count_seconds)
    return SourceNumbers(
        name=documents.source.name,
        documents=len(encoded),
        tokens=sum(lengths),
        trained=sum(int(np.count_nonzero(one.trained)) for one in encoded),
        is_all=is_all,
        lines=lines,
        is_least=not is_counted,
        filled=filled_share(lengths, seq_length) if pack == "document" else 1.0,
    )


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
    sources: Sequence[SourceNumbers], weights: Sequence[float], *, run_tokens: int
) -> str:
    """A line for each source; `run_tokens` are those of all blocks of the run.

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
        if source.tokens:
            epochs = f"{less}{weight * run_tokens * source.filled / (scale * source.tokens):.2f}"
        lines.append(
            f"{weight:7.1%}{cells[0]:>13s}{cells[1]:>15s}{cells[2]:>15s}{epochs:>9s}"
            f"  {shown(source.name)}"
        )
    return "\n".join(lines)
