"""Where the converters' progress goes."""

from __future__ import annotations

import logging
import sys

from huggingface_hub.utils.tqdm import disable_progress_bars


def log_progress() -> None:
    """Sends the project's log lines to stdout, which leaves stderr to errors.

    The libraries' advice is silenced: what they warn of is checked here, and is an error.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for library in ("transformers", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
