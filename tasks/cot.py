"""The registered task `cot`: chain-of-thought prompts of MMLU, one JSON object {key: text}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.text import shown
from tasks.sources.base import BadLineError, Document, Record, Source
from tasks.sources.rows import LINES, check_text

FORM = LINES


def open_local(name: str, path: str) -> Source:
    """The task's one file, that `tasks.registry` names."""
    return Source(name, [CotFile(path)])


@dataclass(frozen=True)
class CotFile:
    """A small file, read whole; a record's offset and line count its entries."""

    path: str

    def read(self, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """See `tasks.sources.base.SourceFile.read`."""
        for index, (key, value) in enumerate(self._load().items()):
            if index >= offset:
                where = f"{self.path}:{shown(key)}"
                yield Record(_parse(value, where), len(str(value)), index + 1, index + 1)

    def _load(self) -> dict[str, Any]:
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                value = json.load(file)
        except OSError as error:
            raise ValueError(f"{self.path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: not JSON in UTF-8: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: expected one object {{key: text}}")
        return value


def _parse(value: Any, where: str) -> Document | BadLineError:
    try:
        return Document(check_text(value, where, "text"), where)
    except BadLineError as error:
        return error
