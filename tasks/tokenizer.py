"""The tokenizer, through transformers."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer

from tasks.registry import shown

TOKENIZER_FLAG = "--tokenizer-name"


def load_tokenizer(name: str) -> Any:
    """Loads a folder's tokenizer, without the network, or the one of a hub name.

    Raises:
        ValueError: It cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(
            name, local_files_only=os.path.isdir(name), trust_remote_code=False
        )
    except Exception as error:  # broken files raise anything, the tokenizers library a plain one
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{TOKENIZER_FLAG} {shown(name)}: expected a folder with a tokenizer or a hub name:"
            f" {lines[0]}"
        ) from error


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Checks that the model has an embedding for every token.

    Raises:
        ValueError: The tokenizer is longer than the model's vocabulary.
    """
    length = max(tokenizer.get_vocab().values(), default=-1) + 1
    if length > vocab_size:
        raise ValueError(
            f"{TOKENIZER_FLAG} {shown(str(tokenizer.name_or_path))}: the tokenizer has {length}"
            f" tokens, expected at most the model's vocabulary of {vocab_size}"
        )
