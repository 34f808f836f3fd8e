"""Tests --train-on completion with several stages and replicas against Hugging Face's model.

Documents are packed end to end; in one of two runs, attention does not cross documents. The labels
for Hugging Face's model are -100 at the tokens of prompts. Only completions consist of digits, so
the test recognises a token of a completion by its characters.
"""

import json
import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.mixture import Pack
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.cases import Case, curve, meet_at, train_cases
from tests.support.data import WORDS, tokenizer
from tests.support.documents import Alone, doc_starts_after
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from tests.support.parity import LAYERS, TOKENS, TOLERANCE, flags, reference, worst

UPDATES = 8


def write_pairs(path: Path) -> Path:
    """Writes 80 pairs: a prompt of one to twelve words, and a completion of one to ten digits."""
    draw = random.Random(5)
    lines = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 12))) + ":",
            "completion": str(draw.randrange(10 ** draw.randint(1, 10))),
        }
        for _ in range(80)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def labels_of(tokens: Tensor) -> Tensor:
    """Returns the tokens as labels; -100 replaces all tokens except digits and the end of text."""
    names = tokenizer().convert_ids_to_tokens(tokens.flatten().tolist())
    trained = [name.isdigit() or name == "<eos>" for name in names]
    return tokens.masked_fill(~torch.tensor(trained).view(tokens.shape), -100)


def blocks(pairs: Path, pack: Pack) -> Iterator[Any]:
    specs = [SourceSpec(str(pairs))]
    stream = open_training_stream(
        specs, tokenizer(), seq_len=TOKENS, seed=42, train_on="completion", pack=pack
    )
    return (stream.next_block().token_ids for _ in count())


@pytest.mark.parametrize(("pack", "shape"), [("concat", (2, 2)), ("document", (4, 1))])
def test_the_loss_is_over_completions_alone(
    pack: Pack, shape: tuple[int, int], tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    model = make_shards(tmp_path, "model", "gptneox", {"num_hidden_layers": LAYERS})
    if pack == "document":
        model = Alone(model, lambda tokens: doc_starts_after(tokens, end=0))
    losses, norms = reference(model, blocks(pairs, pack), 1, labels_of=labels_of, updates=UPDATES)
    assert max(losses) - min(losses) > 0.2, "the loss changes"
    own = flags(tmp_path, "model", "gptneox", 1, updates=UPDATES)
    own |= {"task-name": pairs, "train-on": "completion", "pack": pack}
    run_ranks(4, train_cases, meet_at([shape]), [Case("run", own)], tmp_path, deadline=200.0)
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        found = [float(value) for value in curve(tmp_path, "run", *shape, key=key)]
        error = worst(found, expected)
        print(f"masked, {pack}, P={shape[0]} R={shape[1]}, {key}: {error:.1e}")
        assert error < TOLERANCE
    counts = curve(tmp_path, "run", *shape, key="tokens")
    assert len(set(counts)) > 3, "batches train unequal numbers of tokens"
    assert max(counts) < 4 * (TOKENS - 1) / 2
