"""The registered task `pile`, whose rows have the text and, under `meta`, what does not count."""

from __future__ import annotations

from tasks.sources.rows import LINES

FORM = LINES
