"""Texts, files and a small tokenizer that the tests of `tasks/` share."""

import json
import random
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tasks.mixture import BlockStream, Pack
from tasks.packing.blocks import TokenBlock
from tasks.packing.concat import Packer
from tasks.shuffling.shuffle import Shuffle
from tasks.stream import PACKERS
from tasks.tokenization.encoder import Encoder
from tasks.tokenization.prefetch import DocumentPrefetcher
from tasks.tokenization.workers import Workers

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew potions é ü 漢字"
WORDS = TEXT.split()


@cache
def tokenizer() -> Any:
    """Returns a byte-level BPE of 400 tokens; eos is id 0, and model_max_length is small."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(make_texts(200, seed=0), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>", model_max_length=16)


def make_texts(count: int, *, seed: int, longest: int = 30) -> list[str]:
    """Returns texts that differ; each has its own prefix, then 1 to `longest` random words."""
    draw = random.Random(seed)
    return [
        f"{seed}-{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Writes one text per line; a .zst file has two zstd frames, each with half of the lines."""
    lines = [json.dumps({"text": text, "meta": 1}) + "\n" for text in texts]
    if path.suffix == ".zst":
        half = len(lines) // 2
        parts = ["".join(lines[:half]), "".join(lines[half:])]
        path.write_bytes(b"".join(zstandard.compress(part.encode()) for part in parts))
    else:
        path.write_text("".join(lines), encoding="utf-8")
    return path


def write_folder(path: Path, texts: list[str]) -> Path:
    """Writes the texts to three plain and two compressed files; adds files that are not data."""
    path.mkdir()
    for i in range(5):
        write_jsonl(path / f"part{i}.jsonl{'.zst' if i % 2 else ''}", texts[i::5])
    (path / "README.md").write_text("not data")
    (path / "._part0.jsonl").write_bytes(b"\x00")
    return path


def packed(documents: Shuffle, encoder: Encoder, seq_len: int, pack: Pack = "concat") -> Packer:
    """Returns the packer of one source's documents; this process tokenizes them."""
    encoded = DocumentPrefetcher(documents, Workers(encoder, 0), encoder.train_on)
    return PACKERS[pack](encoded, seq_len)


def through_json(state: dict[str, Any]) -> Any:
    """Converts the state to JSON and back, as a checkpoint does."""
    return json.loads(json.dumps(state))


def check_restored_anywhere(documents: Shuffle, resumed: Shuffle) -> None:
    """Checks that `resumed` continues as `documents` did after each of 30 restored states."""
    states, expected = [], []
    for _ in range(250):
        states.append(through_json(documents.state()))
        expected.append(documents.next())
    for i in random.Random(0).sample(range(250), 30):
        resumed.restore(states[i])
        assert resumed.epoch == states[i]["epoch"]
        assert [resumed.next() for _ in range(30)][: 250 - i] == expected[i : i + 30]


def content(block: TokenBlock) -> list[Any]:
    """Returns the complete content of a block as lists, for comparisons."""
    starts = None if block.doc_starts is None else block.doc_starts.tolist()
    return [block.token_ids.tolist(), block.trained.tolist(), block.documents, starts]


def check_blocks_restored_anywhere(open_stream: Callable[[], Packer | BlockStream]) -> None:
    """Checks that a new stream continues as the first one did after each of 20 restored states."""
    stream, states, blocks = open_stream(), [], []
    for _ in range(200):
        states.append(through_json(stream.state()))
        blocks.append(content(stream.next_block()))
    resumed = open_stream()
    for start in random.Random(0).sample(range(200), 20):
        resumed.restore(states[start])
        assert through_json(resumed.state()) == states[start]
        expected = blocks[start : start + 15]
        assert [content(resumed.next_block()) for _ in expected] == expected
