"""Formats of a line or a table's row: {"text"}, {"prompt", "completion"} or {"messages"}.

A row is read as messages if it has that key, else as prompt and completion if it has both keys,
else as text. Other keys are ignored. Some registered tasks have other formats.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.text import shown
from tasks.sources.base import BadLineError, ChatMessage, Document

_EXPECTED = '{"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [...]}'
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class RowFormat:
    """A format of rows.

    columns: the keys that are read; a table must have at least one of these columns.
    parse: a function of a row and the row's origin; returns the document or raises BadLineError.
    """

    columns: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], str], Document]

    def select_columns(self, names: Iterable[str], table: str) -> list[str]:
        """Returns the columns of this format among `names`; raises ValueError if there is none."""
        present = set(names)
        columns = [name for name in self.columns if name in present]
        if not columns:
            raise ValueError(f"{table}: it has none of the columns {', '.join(self.columns)}")
        return columns


def parse_line(raw: bytes, origin: str, row_format: RowFormat) -> Document | BadLineError:
    """Returns the document of a line of JSON in UTF-8, or the error of a bad line."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadLineError(f"{origin}: not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadLineError(f"{origin}: not JSON: {error}")
    return parse_row(value, origin, row_format)


def parse_row(value: Any, origin: str, row_format: RowFormat) -> Document | BadLineError:
    """Returns the document of a row, or the error of a bad row."""
    if not isinstance(value, Mapping):
        keys = " or ".join(f'"{key}"' for key in row_format.columns)
        expected = _EXPECTED if row_format == TEXT_OR_CHAT else keys
        return BadLineError(f"{origin}: expected an object, {expected}, got {_kind(value)}")
    try:
        return row_format.parse(value, origin)
    except BadLineError as error:
        return error


def _parse(value: Mapping[str, Any], origin: str) -> Document:
    if value.get("messages") is not None:
        return Document("", origin, messages=_parse_messages(value["messages"], origin))
    if value.get("prompt") is not None and value.get("completion") is not None:
        prompt = check_text(value["prompt"], origin, "prompt")
        completion = check_text(value["completion"], origin, "completion")
        return prompt_document(prompt, completion, origin)
    if "text" not in value:
        raise BadLineError(f'{origin}: the object has no "text": expected {_EXPECTED}')
    return Document(check_text(value["text"], origin, "text"), origin)


TEXT_OR_CHAT = RowFormat(("text", "prompt", "completion", "messages"), _parse)


def prompt_document(prompt: str, completion: str, origin: str) -> Document:
    """Returns a document: the prompt directly followed by the completion."""
    text = prompt + completion
    return Document(text, origin, completions=((len(prompt), len(text)),))


def check_text(value: Any, origin: str, key: str) -> str:
    """Returns `value`; if it is not a valid string, raises BadLineError, which names `key`."""
    if not isinstance(value, str):
        raise BadLineError(f'{origin}: expected a string as "{key}", got {_kind(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLineError(f'{origin}: "{key}" holds a lone surrogate') from error
    return value


def _parse_messages(value: Any, origin: str) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else _kind(value)
        raise BadLineError(f'{origin}: expected a list of messages as "messages", got {kind}')
    messages = []
    for index, item in enumerate(value):
        key = f"messages[{index}]"
        if not isinstance(item, dict):
            raise BadLineError(
                f'{origin}: {key}: expected {{"role": "...", "content": "..."}}, got {_kind(item)}'
            )
        role = check_text(item.get("role"), origin, f"{key}.role")
        content = check_text(item.get("content"), origin, f"{key}.content")
        messages.append(ChatMessage(role, content))
    return tuple(messages)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kind = "number" if type(value) in (int, float) else type(value).__name__
    names = {"dict": "an object", "list": "a list", "str": "a string", "bool": "a boolean"}
    return "bytes" if kind == "bytes" else names.get(kind, f"a {kind}")


def read_json(path: str, problem: str) -> Any:
    """Returns the content of a JSON file; raises ValueError if it cannot be read or is not JSON.

    problem: what the error says about a file that is not JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)}: {problem}: {error}") from error
