"""The registered task `p3`, the Public Pool of Prompts: inputs (a prompt) and targets (an answer).

A row has `inputs_pretokenized` and `targets_pretokenized`, or `inputs` and `targets`:

    {"inputs_pretokenized": "Is it raining?", "targets_pretokenized": "no"}

The document is the inputs followed by the targets. A space is added between them if there is no
white space. The completion is the text after the inputs.
"""

from collections.abc import Mapping
from typing import Any

from tasks.sources.base import Document
from tasks.sources.rows import RowFormat, check_text, prompt_document

# If a row has pretokenized texts, its inputs and targets are ids of T5's tokens.
PRETOKENIZED = ("inputs_pretokenized", "targets_pretokenized")
PLAIN = ("inputs", "targets")


def _parse(row: Mapping[str, Any], origin: str) -> Document:
    """Returns a row's document; adds a space if no white space separates inputs and targets."""
    keys = PLAIN if row.get(PRETOKENIZED[0]) is None else PRETOKENIZED
    inputs, targets = (check_text(row.get(key), origin, key) for key in keys)
    is_separated = not inputs or inputs[-1].isspace() or targets[:1].isspace()
    return prompt_document(inputs, targets if is_separated else f" {targets}", origin)


ROW_FORMAT = RowFormat((*PRETOKENIZED, *PLAIN), _parse)
