"""Loading of the tokenizer with transformers, and checks of the tokenizer."""

import os
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoTokenizer

from common.text import shown

TOKENIZER_FLAG = "--tokenizer-name"
HUB_TIMEOUT_SECONDS = 10.0


def load_tokenizer(name: str) -> Any:
    """Loads a tokenizer from a folder or from the hub; raises ValueError if this fails."""
    try:
        return _load_local(name) if os.path.isdir(name) else _load_hub(name)
    except Exception as error:  # broken files raise many types of errors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{TOKENIZER_FLAG} {shown(name)}: expected a folder with a tokenizer or a hub name:"
            f" {lines[0]}"
        ) from error


def _load_local(name: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    # If a folder has only config.json, transformers makes a tokenizer without tokens.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError("there are no tokenizer files")
    return tokenizer


def _load_hub(name: str) -> Any:
    try:
        return _load_local(name)
    except (OSError, ValueError):
        # This fails at once; loading would try for a minute.
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
        AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return _load_local(name)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has more tokens than the model's vocabulary."""
    num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_tokens > vocab_size:
        raise ValueError(
            f"{TOKENIZER_FLAG} {shown(str(tokenizer.name_or_path))}: the tokenizer has {num_tokens}"
            f" tokens, expected at most the model's vocabulary of {vocab_size}"
        )
