"""--train-on completion over stages and replicas against Hugging Face's model given labels of -100,
with documents end to end and apart.

Completions are of digits, and prompts are not, so that the labels follow from a token's characters.
"""

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

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
from tests.support.parity import TOKENS, TOLERANCE, flags, reference, worst

SHAPES = [(2, 2), (4, 1)]


def write_pairs(path: Path) -> Path:
    """Prompts of one to twelve words, completions of one to ten digits."""
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
    """-100 for what is neither of digits nor the end of text."""
    names = tokenizer().convert_ids_to_tokens(tokens.flatten().tolist())
    trained = [name.isdigit() or name == "<eos>" for name in names]
    return tokens.masked_fill(~torch.tensor(trained).view(tokens.shape), -100)


class Trained(NamedTuple):
    """The folder of all runs, and for each way to pack the reference's losses and norms."""

    folder: Path
    references: dict[Pack, tuple[list[float], list[float]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("masked")
    pairs = write_pairs(folder / "pairs.jsonl")
    model = make_shards(folder, "model", "gptneox", {"num_hidden_layers": 7})
    alone = Alone(deepcopy(model), lambda tokens: doc_starts_after(tokens, end=0))
    references: dict[Pack, tuple[list[float], list[float]]] = {
        "concat": reference(model, blocks(pairs, "concat"), 1, labels_of=labels_of),
        "document": reference(alone, blocks(pairs, "document"), 1, labels_of=labels_of),
    }
    own = flags(folder, "model", "gptneox", 1) | {"task-name": pairs, "train-on": "completion"}
    cases = [Case(pack, own | {"pack": pack}) for pack in references]
    run_ranks(4, train_cases, meet_at(SHAPES), cases, folder, deadline=200.0)
    return Trained(folder, references)


def blocks(pairs: Path, pack: Pack) -> Iterator[Any]:
    stream = open_training_stream(
        [SourceSpec(str(pairs))],
        tokenizer(),
        seq_len=TOKENS,
        seed=42,
        train_on="completion",
        pack=pack,
    )
    return (stream.next_block().token_ids for _ in count())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pack", ["concat", "document"])
def test_the_loss_is_over_completions_alone(
    pack: Pack, shape: tuple[int, int], trained: Trained
) -> None:
    folder, (losses, norms) = trained.folder, trained.references[pack]
    assert max(losses) - min(losses) > 0.2, "the loss moves"
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        found = [float(value) for value in curve(folder, pack, *shape, key=key)]
        error = worst(found, expected)
        print(f"masked, {pack}, P={shape[0]} R={shape[1]}, {key}: {error:.1e}")
        assert error < TOLERANCE
    counts = curve(folder, pack, *shape, key="tokens")
    assert len(set(counts)) > 3, "batches train unequal numbers of tokens"
    assert max(counts) < 4 * (TOKENS - 1) / 2
