"""The registered task `cot`: chain-of-thought prompts of MMLU in one JSON object {key: text}."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.text import shown
from tasks.sources.base import BadLineError, DataSource, Document, DocumentRecord, row_record
from tasks.sources.rows import check_text, read_json


def open_local(name: str, path: str) -> DataSource:
    """Returns the data source of the task's only file."""
    return DataSource(name, [CotFile(path)])


@dataclass(frozen=True)
class CotFile:
    """The task's JSON file; `read` loads the complete file into memory.

    A record's offset and line are both the number of its entry in the file, counted from 1.
    """

    path: str

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        entries = read_json(self.path, "not JSON in UTF-8")
        if not isinstance(entries, dict):
            raise ValueError(f"{self.path}: expected one object {{key: text}}")
        for index, (key, value) in enumerate(entries.items()):
            if index >= offset:
                yield row_record(_parse(value, f"{self.path}:{shown(key)}"), index + 1)


def _parse(value: Any, origin: str) -> Document | BadLineError:
    try:
        return Document(check_text(value, origin, "text"), origin)
    except BadLineError as error:
        return error
