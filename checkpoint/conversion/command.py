"""The commands of the convert scripts, after their flags are parsed.

torch is imported here only once the flags are right, so that a mistake is reported at once.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from common.text import one_line
from modules.registry import MODELS


def run_from_hf(model_type: str, flags: Mapping[str, Any]) -> None:
    """Converts a Hugging Face model to layer shards; exit status 2 and one line for bad input."""
    with _command():
        from checkpoint.conversion.from_hf import convert_from_hf

        convert_from_hf(MODELS[model_type].load(), **flags)


def run_to_hf(model_type: str, flags: Mapping[str, Any]) -> None:
    """Converts a checkpoint to a Hugging Face model; exit status 2 and one line for bad input."""
    with _command():
        from checkpoint.conversion.to_hf import convert_to_hf

        convert_to_hf(MODELS[model_type].load(), **flags)


@contextmanager
def _command() -> Iterator[None]:
    """Sends the project's log lines to stdout, which leaves stderr to errors.

    The libraries' warnings are silenced: the conversion checks the same things, as errors.
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
