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
from modules.registry import MODELS, model_type_of


def run_from_hf(model_type: str | None, flags: Mapping[str, Any]) -> None:
    """Converts a Hugging Face model to layer shards; None: config.json tells the model type.

    Exits with status 2 and one line on stderr if the input is bad.
    """
    with _command():
        from checkpoint.conversion.from_hf import convert_from_hf
        from checkpoint.files.model_folder import find_model

        if model_type is None:
            source = find_model(flags["model_name"], flag="--model-name", weights=False)
            model_type = model_type_of(source)
        convert_from_hf(MODELS[model_type].load(), **flags)


def run_to_hf(model_type: str | None, flags: Mapping[str, Any]) -> None:
    """Converts a checkpoint to a Hugging Face model; None: config.json tells the model type.

    Exits with status 2 and one line on stderr if the input is bad.
    """
    with _command():
        from checkpoint.conversion.to_hf import config_folder, convert_to_hf
        from checkpoint.steps.stage_weights import resolve_checkpoint

        if model_type is None:
            step = resolve_checkpoint(flags["ckpt_path"])
            model_type = model_type_of(config_folder(step, flags["config_name"]))
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
