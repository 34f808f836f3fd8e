"""Tests --pack document, on several stages and replicas, against a Hugging Face model.

This reference computes the loss of each document separately; an end-of-text token ends a document.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from monitor.metrics import read_metrics
from tests.support.cases import Case, curve, meet_at, run_folder, train_cases
from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.documents import Alone, doc_starts_after, losses_alone
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from tests.support.parity import (
    DROPOUT,
    MODELS_TRIED,
    SHORT,
    TOLERANCE,
    blocks,
    flags,
    reference,
    worst,
)

MIDDLE = (4, 1)  # middle stages have neither tokens nor labels
SHAPES = [(2, 2), MIDDLE]
UPDATES = 8
END = 0  # the tokenizer's end of text
APART = {"pack": "document"}
TRIED = [("neox", (2, 2)), ("gptj", MIDDLE)]
SCHEDULED = [("gpipe", "true"), ("1f1b", "false"), ("zb-h1", "true")]


class Reference(NamedTuple):
    """Results of the reference: losses, gradient norms, and the held-out loss before training."""

    losses: list[float]
    norms: list[float]
    held_out: float


class Trained(NamedTuple):
    """The runs' folder and the references; `together`: losses when attention crosses documents."""

    folder: Path
    references: dict[str, Reference]
    together: list[float]


def find(tokens: Tensor) -> Tensor:
    return doc_starts_after(tokens, END)


@torch.no_grad()
def held_out_loss(model: Alone, path: Path) -> float:
    """Gives the model one document at a time; returns the mean loss over all predicted tokens."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    found = [
        losses_alone(model.model, torch.tensor([*tokenizer()(text)["input_ids"], END]))
        for text in texts
    ]
    return torch.cat(found).mean().item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains the models in TRIED; makes short runs with SCHEDULED's settings and with dropout."""
    folder = tmp_path_factory.mktemp("apart")
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1, longest=4))
    write_jsonl(folder / "b.jsonl", make_texts(60, seed=2))
    held_out = write_jsonl(folder / "c.jsonl", make_texts(5, seed=3, longest=4))
    make_shards(folder, "dropout", *DROPOUT)
    cases, references = [], {}
    for name, shape in TRIED:
        family, changes = MODELS_TRIED[name]
        model = make_shards(folder, name, family, changes)
        if name == "neox":
            together, _ = reference(deepcopy(model), blocks(folder), 1, updates=UPDATES)
        alone = Alone(model, find)
        before = held_out_loss(alone, held_out)
        found = reference(alone, blocks(folder, "document"), 1, updates=UPDATES)
        references[name] = Reference(*found, before)
        own = flags(folder, name, family, 1, updates=UPDATES) | APART
        cases.append(Case(name, own | {"evaluation-data": held_out}, shapes=[shape]))
    short = flags(folder, "neox", "gptneox", 1, updates=SHORT) | APART
    for mode, recompute in SCHEDULED:
        changed = short | {"pp-mode": mode, "recompute": recompute, "micro-batch-size": 1}
        cases.append(Case(f"{mode}-{recompute}", changed, shapes=[MIDDLE]))
    cases.append(Case("dropout", short | {"model-name": folder / "shards" / "dropout"}))
    run_ranks(4, train_cases, meet_at(SHAPES), cases, folder, deadline=400.0)
    return Trained(folder, references, together)


@pytest.mark.parametrize(("name", "shape"), TRIED)
def test_losses_are_those_of_each_document_alone(
    name: str, shape: tuple[int, int], trained: Trained
) -> None:
    losses, norms, held_out = trained.references[name]
    assert max(losses) - min(losses) > 0.2, "the loss changes"
    first = read_metrics(run_folder(trained.folder, name, *shape) / "metrics.jsonl")[0]
    for key, found, expected in (
        ("loss", curve(trained.folder, name, *shape), losses),
        ("grad_norm", curve(trained.folder, name, *shape, key="grad_norm"), norms),
        ("eval_loss_before", [first["eval_loss_before"]], [held_out]),
    ):
        error = worst(found, expected)
        print(f"{name} apart, P={shape[0]} R={shape[1]}, {key}: {error:.1e}")
        assert error < TOLERANCE
    if name == "neox":
        assert worst(losses, trained.together) > 100 * TOLERANCE, (
            "keeping documents apart changes losses"
        )


def test_bits_depend_on_neither_schedule_nor_recompute(trained: Trained) -> None:
    names = [f"{mode}-{recompute}" for mode, recompute in SCHEDULED]
    for key in ("loss", "grad_norm"):
        curves = [curve(trained.folder, name, *MIDDLE, key=key) for name in names]
        assert len(curves[0]) == SHORT
        assert curves == [curves[0]] * len(curves)
    first = curve(trained.folder, names[0], *MIDDLE)[0]
    assert worst([first], trained.references["neox"].losses[:1]) < TOLERANCE


def test_dropout_is_the_same_in_every_shape(trained: Trained) -> None:
    one, other = (curve(trained.folder, "dropout", *shape) for shape in SHAPES)
    assert worst(one, other) < TOLERANCE
    assert worst(one[:1], trained.references["neox"].losses[:1]) > 1e-3
