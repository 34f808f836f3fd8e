"""The registered task `p3`, the Public Pool of Prompts: what is asked, and what answers it.

A row has `inputs_pretokenized` and `targets_pretokenized`, or, where those are not there, `inputs`
and `targets`. The document is the inputs and the targets, with one space between them unless there
is white space already; the completion is all after the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.sources.base import Document
from tasks.sources.rows import Form, answered, check_text

# As published with pretokenized texts, inputs and targets are numbers of T5's tokens.
PAIRS = (("inputs_pretokenized", "targets_pretokenized"), ("inputs", "targets"))


def _parse(row: Mapping[str, Any], where: str) -> Document:
    is_there = row.get(PAIRS[0][0]) is not None
    inputs, targets = (check_text(row.get(key), where, key) for key in PAIRS[0 if is_there else 1])
    is_apart = not inputs or inputs[-1].isspace() or targets[:1].isspace()
    return answered(inputs, targets if is_apart else f" {targets}", where)


FORM = Form(tuple(key for pair in PAIRS for key in pair), _parse)
