"""Tests that 2 x 2 ranks compute the same losses of held-out sets as Hugging Face's model.

The reference is that model in one process. The reference packs the texts itself, and evaluates
before the first update and after the last update.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy

from monitor.metrics import read_metrics
from tests.support.cases import Case, meet_at, run_folder, train_cases
from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from tests.support.parity import LAYERS, ROWS, TOKENS, TOLERANCE, blocks, flags, reference, worst

SETS = {"wiki": make_texts(30, seed=5), "b": make_texts(7, seed=8, longest=9)}
SHAPE = (2, 2)
UPDATES = 14
HALF = UPDATES // 2


class Sums(NamedTuple):
    loss: float
    tokens: int


class Trained(NamedTuple):
    """The folder of all runs; for each set, the reference's `Sums` before and after training."""

    folder: Path
    before: dict[str, Sums]
    after: dict[str, Sums]


def sums_of(model: Any, texts: list[str]) -> Sums:
    """Cuts a set into blocks; returns the sum of the losses, and the number of predicted tokens."""
    backend = tokenizer().backend_tokenizer
    tokens = torch.tensor([t for text in texts for t in [*backend.encode(text).ids, 0]])
    losses = []
    with torch.no_grad():
        for block in tokens.split(TOKENS):
            logits = model(block[None]).logits[0]
            losses += cross_entropy(logits[:-1], block[1:], reduction="none").tolist()
    return Sums(math.fsum(losses), len(losses))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("sets")
    for name, seed in (("a", 1), ("b", 2)):
        write_jsonl(folder / f"{name}.jsonl", make_texts(60, seed=seed))
    (folder / "held").mkdir()
    first = write_jsonl(folder / "held" / "first.jsonl", SETS["wiki"])
    second = write_jsonl(folder / "held" / "b.jsonl", SETS["b"])
    model = make_shards(folder, "model", "gptneox", {"num_hidden_layers": LAYERS})
    before = {name: sums_of(model, texts) for name, texts in SETS.items()}
    reference(model, blocks(folder), 1, updates=UPDATES)
    after = {name: sums_of(model, texts) for name, texts in SETS.items()}
    halves = {"evaluation-steps": HALF, "checkpoint-steps": HALF}
    own = flags(folder, "model", "gptneox", 1, updates=UPDATES) | halves
    own["evaluation-data"] = f"wiki={first},{second}"
    short = {"total-steps": 1, "warmup-steps": 0}
    cases = [
        Case("sets", own),
        Case("resumed", own, after=(f"sets-{SHAPE[0]}-{SHAPE[1]}", HALF)),
        Case("alone", own | short | {"evaluation-data": first}),
        Case("one", own | short | {"evaluation-data": f"wiki={first}"}),
        Case("limited", own | short | {"evaluation-num-batch": 1}),
    ]
    run_ranks(4, train_cases, meet_at([SHAPE]), cases, folder, deadline=200.0)
    return Trained(folder, before, after)


def lines_of(trained: Trained, name: str) -> list[dict[str, Any]]:
    return read_metrics(run_folder(trained.folder, name, *SHAPE) / "metrics.jsonl")


@pytest.mark.parametrize(("suffix", "step"), [("_before", 1), ("", UPDATES)])
def test_each_set_has_the_loss_of_one_process(suffix: str, step: int, trained: Trained) -> None:
    expected = trained.before if suffix else trained.after
    found = lines_of(trained, "sets")[step - 1]
    sets = found[f"eval_sets{suffix}"]
    assert list(sets) == list(SETS)
    for name, one in expected.items():
        assert sets[name]["tokens"] == one.tokens
        error = worst([sets[name]["loss"]], [one.loss / one.tokens])
        print(f"{name}{suffix}: {error:.1e}")
        assert error < TOLERANCE
        assert sets[name]["perplexity"] == pytest.approx(math.exp(sets[name]["loss"]))
    together = [sum(column) for column in zip(*expected.values(), strict=True)]
    error = worst([found[f"eval_loss{suffix}"]], [together[0] / together[1]])
    print(f"all{suffix}: {error:.1e}")
    assert error < TOLERANCE


def test_the_reference_tells_the_sets_apart(trained: Trained) -> None:
    """The sets differ in size and mean loss, and training changes the loss of each set."""
    assert trained.before["wiki"].tokens > 4 * trained.before["b"].tokens
    for sums in (trained.before, trained.after):
        means = [one.loss / one.tokens for one in sums.values()]
        assert abs(means[0] - means[1]) > 0.01 * means[0]
    for name in SETS:
        assert trained.before[name].loss - trained.after[name].loss > 0.1 * trained.after[name].loss


def test_sets_are_told_where_they_were_evaluated(trained: Trained) -> None:
    for line in lines_of(trained, "sets"):
        due = line["step"] % HALF == 0
        assert [key in line for key in ("eval_loss", "eval_sets")] == [due, due]
        first = line["step"] == 1
        assert [key in line for key in ("eval_loss_before", "eval_sets_before")] == [first, first]


def test_a_resumed_run_has_the_same_bits(trained: Trained) -> None:
    keys = ("loss", "eval_loss", "eval_sets", "eval_sets_before")
    whole, resumed = (lines_of(trained, name) for name in ("sets", "resumed"))
    for key in keys:
        assert [line.get(key) for line in resumed] == [line.get(key) for line in whole]
    assert [line["step"] for line in resumed if "resumed" in line] == [HALF + 1]


def test_one_set_without_a_name_has_none(trained: Trained) -> None:
    """If the only set has no name, metrics have no eval_sets; a name does not change the loss."""
    (alone,), (named,) = lines_of(trained, "alone"), lines_of(trained, "one")
    keys = [key for key in alone if key.startswith("eval")]
    assert keys == ["eval_loss", "eval_perplexity", "eval_loss_before"]
    of_many = lines_of(trained, "sets")[0]["eval_sets_before"]["wiki"]
    assert named["eval_sets_before"] == {"wiki": of_many}
    assert named["eval_loss_before"] == alone["eval_loss_before"] == of_many["loss"]
    assert named["eval_loss"] == alone["eval_loss"] == named["eval_sets"]["wiki"]["loss"]


def test_a_limit_is_of_each_set(trained: Trained) -> None:
    """--evaluation-num-batch limits the batches of each set; a batch has both replicas' rows."""
    (line,) = lines_of(trained, "limited")
    tokens = {name: one["tokens"] for name, one in line["eval_sets"].items()}
    assert tokens["wiki"] == ROWS * (TOKENS - 1) < trained.before["wiki"].tokens
    assert tokens["b"] == min(ROWS * (TOKENS - 1), trained.before["b"].tokens)
