"""Check of the model that the quick start trained; it uses plain transformers, not this project."""

import json
import math
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

TOLERANCE = 5e-4  # relative; half a unit in the third digit is at least this
NEEDED_FALL = 5.0
PROMPT = "Return"


def check_curve(metrics: Path, *, total_steps: int, resumed_from: int) -> None:
    """Checks that each step was recorded once, and that the run resumed from the expected step.

    Raises SystemExit otherwise.
    """
    lines = read_metrics(metrics)
    steps = [line["step"] for line in lines]
    resumed = [line["step"] for line in lines if line.get("resumed")]
    if steps != list(range(1, total_steps + 1)) or resumed != [resumed_from + 1]:
        sys.exit(f"{metrics}: steps {steps}, resumed at {resumed}")


def check_model(
    folder: Path, *, held_out: Path, metrics: Path, seq_length: int
) -> tuple[float, float, str]:
    """Computes the held-out perplexity, compares it with the reported one, and generates a sample.

    Returns:
        The reported perplexities before and after training, and an indented sample.

    Raises:
        SystemExit: the computed perplexity differs from the one that was reported after training,
            or training reduced the perplexity by less than a factor of NEEDED_FALL.
    """
    logging.disable_progress_bar()
    model, tokenizer = load(folder)
    ours = math.exp(held_out_loss(model, blocks(tokenizer, held_out, seq_length)))
    before, reported = reported_perplexities(metrics)
    check(before, reported, ours)
    text = sample(model, tokenizer)
    return before, reported, textwrap.indent(f"a sample:\n{text}", "    ")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of metrics.jsonl."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def load(folder: Path) -> tuple[Any, Any]:
    """Loads model and tokenizer; exits if a weight is missing or unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        sys.exit(f"{folder} does not load cleanly: {wrong}")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def blocks(tokenizer: Any, path: Path, seq_length: int) -> Iterator[list[int]]:
    """Joins the documents, each with an end token, and yields blocks of `seq_length` tokens."""
    tokens: list[int] = []
    for line in path.read_text().splitlines():
        tokens += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
    for start in range(0, len(tokens), seq_length):
        yield tokens[start : start + seq_length]


@torch.no_grad()
def held_out_loss(model: Any, token_blocks: Iterator[list[int]]) -> float:
    """Returns the mean loss in nats over all tokens except the first token of each block."""
    total, count = 0.0, 0
    for block in token_blocks:
        tokens = torch.tensor(block)
        logits = model(tokens[None]).logits[0, :-1]
        total += float(cross_entropy(logits, tokens[1:], reduction="sum"))
        count += len(block) - 1
    return total / count


def reported_perplexities(path: Path) -> tuple[float, float]:
    """Returns the perplexity before training and the last perplexity, both from metrics.jsonl."""
    lines = read_metrics(path)
    return math.exp(lines[0]["eval_loss_before"]), lines[-1]["eval_perplexity"]


def check(before: float, reported: float, ours: float) -> None:
    """Raises SystemExit if `ours` and `reported` differ, or `before / reported` < NEEDED_FALL."""
    if not math.isclose(reported, ours, rel_tol=TOLERANCE):
        sys.exit(f"training reported {reported:.4g}, but transformers computes {ours:.4g}")
    if before < NEEDED_FALL * reported:
        sys.exit(f"perplexity fell from {before:.4g} to {reported:.4g}: less than fivefold")


def sample(model: Any, tokenizer: Any) -> str:
    """Generates a text that begins with PROMPT; the text is the same each time."""
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(
        **prompt, max_new_tokens=60, do_sample=True, top_k=20, pad_token_id=tokenizer.eos_token_id
    )
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text
