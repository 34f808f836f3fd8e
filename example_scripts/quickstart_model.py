"""Input of the quick start: a small GPT-NeoX in the Hugging Face format, and a corpus.

The corpus is the documentation strings of Python's standard library, read from its source without
importing it. On one machine, model and corpus are the same each time.
"""

import argparse
import ast
import inspect
import itertools
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

EOS = "<|endoftext|>"
VOCAB_SIZE = 2048
MIN_CHARACTERS = 80  # shorter documentation strings are skipped
HELD_OUT_EVERY = 40  # each 40th document is held out
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def main() -> None:
    """Writes <folder>/hf/small-neox, <folder>/train.jsonl and <folder>/held_out.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder))


def make(folder: Path, num_documents: int | None = None) -> str:
    """Writes the model and a corpus of `num_documents` (None: all); returns their sizes as text."""
    found = unique(docstrings(Path(sysconfig.get_paths()["stdlib"])))
    documents = list(itertools.islice(found, num_documents))
    held_out = documents[::HELD_OUT_EVERY]
    train = [text for number, text in enumerate(documents) if number % HELD_OUT_EVERY]
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "held_out.jsonl", held_out)
    num_parameters = write_model(folder / "hf" / "small-neox", train_tokenizer(train))
    return (
        f"{num_parameters / 1e6:.1f} million parameters; {len(train)} documents to train on, "
        f"{len(held_out)} held out"
    )


def docstrings(stdlib: Path) -> Iterator[str]:
    """Yields the cleaned documentation strings of modules, classes and functions in a folder."""
    for path in sorted(stdlib.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(stdlib).parts):
            yield from file_docstrings(path)


def file_docstrings(path: Path) -> Iterator[str]:
    """Yields the documentation strings of a file; none if this Python cannot parse the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about escape sequences in that file
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield inspect.cleandoc(ast.get_docstring(node, clean=False) or "")


def unique(texts: Iterable[str]) -> Iterator[str]:
    """Yields each text once, in order; skips texts of fewer than MIN_CHARACTERS characters."""
    seen = set()
    for text in texts:
        if len(text) >= MIN_CHARACTERS and text not in seen:
            seen.add(text)
            yield text


def write_jsonl(path: Path, texts: Iterable[str]) -> None:
    """Writes a file with one {"text": ...} per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of VOCAB_SIZE tokens; one of them is the token EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> int:
    """Saves a model with random weights, and the tokenizer; returns the number of parameters."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=256,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
