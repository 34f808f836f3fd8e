"""Entry points of the convert scripts, called after the flags are parsed.

The functions import torch only when they run. So a script reports a wrong flag at once, and does
not wait for the import first.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from common.text import one_line
from modules.registry import MODELS


def run_from_hf(model_type: str, flags: Mapping[str, Any]) -> None:
    """Converts a Hugging Face model to layer shards.

    Exits with status 2 and one line on stderr if the input is bad.
    """
    with _command():
        from checkpoint.conversion.from_hf import convert_from_hf

        convert_from_hf(MODELS[model_type].load(), **flags)


def run_to_hf(model_type: str, flags: Mapping[str, Any]) -> None:
    """Converts a checkpoint to a Hugging Face model.

    Exits with status 2 and one line on stderr if the input is bad.
    """
    with _command():
        from checkpoint.conversion.to_hf import convert_to_hf

        convert_to_hf(MODELS[model_type].load(), **flags)


@contextmanager
def _command() -> Iterator[None]:
    """Writes the log lines of the `with` block to stdout; exits with status 2 after an error.

    The error (ValueError or OSError) is written to stderr as one line. Warnings of libraries are
    not shown, because the conversion itself raises an error for each problem of which they warn.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for library in ("transformers", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(one_line(error) + "\n")
        raise SystemExit(2) from error
