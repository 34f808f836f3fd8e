"""The registered task `cot`: chain-of-thought prompts of MMLU, one JSON object {key: text}."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.text import shown
from tasks.sources.base import BadLineError, DataSource, Document, DocumentRecord
from tasks.sources.rows import check_text


def open_local(name: str, path: str) -> DataSource:
    """Returns the source of the task's one file."""
    return DataSource(name, [CotFile(path)])


@dataclass(frozen=True)
class CotFile:
    """A small file, loaded at once; the offset and line of a record count its entries."""

    path: str

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        """See `tasks.sources.base.SourceFile.read`."""
        for index, (key, value) in enumerate(self._load().items()):
            if index >= offset:
                document = _parse(value, f"{self.path}:{shown(key)}")
                yield DocumentRecord(document, len(str(value)), index + 1, index + 1)

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


def _parse(value: Any, origin: str) -> Document | BadLineError:
    try:
        return Document(check_text(value, origin, "text"), origin)
    except BadLineError as error:
        return error
