"""--train-on completion over stages and replicas against Hugging Face's model given labels of -100.

Completions are of digits, and prompts are not, so that the labels follow from a token's characters.
"""

from __future__ import annotations

import json
import random
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tasks.build import open_training_stream
from tasks.registry import SourceSpec
from tests.dist import run_ranks
from tests.runs import Case, curve, meet_at, train_cases
from tests.tasks.material import WORDS, tokenizer
from tests.test_parity import TOKENS, TOLERANCE, flags, make_shards, reference, worst

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], list[float]]:
    """The folder of all runs, and the reference's losses and norms."""
    folder = tmp_path_factory.mktemp("masked")
    pairs = write_pairs(folder / "pairs.jsonl")
    model = make_shards(folder, "model", "gptneox", {"num_hidden_layers": 7})
    stream = open_training_stream(
        [SourceSpec(str(pairs))], tokenizer(), seq_length=TOKENS, seed=42, train_on="completion"
    )
    blocks = (stream.next_block().tokens for _ in count())
    losses, norms = reference(model, blocks, 1, labels_of=labels_of)
    of_run = flags(folder, "model", "gptneox", 1)
    case = Case("masked", of_run | {"task-name": pairs, "train-on": "completion"})
    run_ranks(4, train_cases, meet_at(SHAPES), [case], folder, deadline=200.0)
    return folder, losses, norms


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_over_completions_alone(
    shape: tuple[int, int], trained: tuple[Path, list[float], list[float]]
) -> None:
    folder, losses, norms = trained
    assert max(losses) - min(losses) > 0.2, "the loss moves"
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        found = [float(value) for value in curve(folder, "masked", *shape, key=key)]
        error = worst(found, expected)
        print(f"masked, P={shape[0]} R={shape[1]}, {key}: {error:.1e}")
        assert error < TOLERANCE
    counts = curve(folder, "masked", *shape, key="tokens")
    assert len(set(counts)) > 3, "batches train unequal numbers of tokens"
    assert max(counts) < 4 * (TOKENS - 1) / 2
