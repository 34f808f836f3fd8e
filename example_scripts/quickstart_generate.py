"""Looks at what quickstart.sh trained, with plain transformers and nothing of this project.

Measures the held-out perplexity, compares it with what training reported, and generates a sample.
Exit status 1 where they differ, or where training did not bring it down at least fivefold.
"""

import argparse
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

TOLERANCE = 5e-4  # half a unit in the third digit, at the least
NEEDED_FALL = 5.0
PROMPT = "Return"


def main() -> None:
    """Prints both perplexities and a sample; raises SystemExit where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--seq-length", type=int, required=True)
    args = parser.parse_args()
    logging.disable_progress_bar()
    model, tokenizer = load(args.model)
    ours = math.exp(held_out_loss(model, blocks(tokenizer, args.held_out, args.seq_length)))
    before, reported = reported_perplexities(args.metrics)
    print(f"    held-out perplexity before training:                    {before:.2f}")
    print(f"    held-out perplexity after it, as training reported it:  {reported:.2f}")
    print(f"    held-out perplexity after it, computed by transformers: {ours:.2f}")
    check(before, reported, ours)
    print(textwrap.indent(f"a sample:\n{sample(model, tokenizer)}", "    "))


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer; exits where a weight is missing or has no place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        sys.exit(f"{folder} does not load cleanly: {wrong}")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def blocks(tokenizer: Any, path: Path, seq_length: int) -> Iterator[list[int]]:
    """The documents one after another, each with an end of text, cut every `seq_length` tokens."""
    tokens: list[int] = []
    for line in path.read_text().splitlines():
        tokens += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
    for start in range(0, len(tokens), seq_length):
        yield tokens[start : start + seq_length]


@torch.no_grad()
def held_out_loss(model: Any, token_blocks: Iterator[list[int]]) -> float:
    """The mean over all tokens but each block's first of the loss in nats."""
    total, count = 0.0, 0
    for block in token_blocks:
        tokens = torch.tensor(block)
        logits = model(tokens[None]).logits[0, :-1]
        total += float(cross_entropy(logits, tokens[1:], reduction="sum"))
        count += len(block) - 1
    return total / count


def reported_perplexities(path: Path) -> tuple[float, float]:
    """The perplexities that training wrote to metrics.jsonl: before it, and the last one."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return math.exp(lines[0]["eval_loss_before"]), lines[-1]["eval_perplexity"]


def check(before: float, reported: float, ours: float) -> None:
    """Raises SystemExit where the two disagree, or the perplexity has not fallen enough."""
    if not math.isclose(reported, ours, rel_tol=TOLERANCE):
        sys.exit(f"training reported {reported:.4g}, but transformers computes {ours:.4g}")
    if before < NEEDED_FALL * reported:
        sys.exit(f"perplexity fell from {before:.4g} to {reported:.4g}: less than fivefold")


def sample(model: Any, tokenizer: Any) -> str:
    """Text that the model writes after PROMPT, the same each time."""
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(
        **prompt, max_new_tokens=60, do_sample=True, top_k=20, pad_token_id=tokenizer.eos_token_id
    )
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text


if __name__ == "__main__":
    main()
