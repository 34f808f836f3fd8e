"""What a line, or a row of a table, says: {"text"}, {"prompt", "completion"} or {"messages"}.

Of several, messages go first, then prompt and completion; what else there is does not count.
Registered tasks have rows of other forms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.sources.base import BadLineError, ChatMessage, Document

FORMS = '{"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [...]}'

_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Form:
    """What rows say: `columns` are the keys that count, any of which a table must have.

    `parse` makes a document of a row that stands at a place, or raises BadLineError.
    """

    columns: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], str], Document]

    def of_table(self, names: Iterable[str], where: str) -> list[str]:
        """Those of a table's columns that count.

        Raises:
            ValueError: None does.
        """
        has = set(names)
        columns = [name for name in self.columns if name in has]
        if not columns:
            raise ValueError(f"{where}: it has none of the columns {', '.join(self.columns)}")
        return columns


def parse_line(raw: bytes, where: str, form: Form | None = None) -> Document | BadLineError:
    """The document of a line, or what is wrong: it is none of `form`, or of FORMS, in UTF-8."""
    try:
        value = _parse_json(raw, where)
    except BadLineError as error:
        return error
    return parse_row(value, where, form)


def parse_row(value: Any, where: str, form: Form | None = None) -> Document | BadLineError:
    """The same of a table's row."""
    form = form or LINES
    try:
        if not isinstance(value, Mapping):
            what = FORMS if form == LINES else " or ".join(f'"{key}"' for key in form.columns)
            raise BadLineError(f"{where}: expected an object, {what}, got {_kind(value)}")
        return form.parse(value, where)
    except BadLineError as error:
        return error


def _parse(value: Mapping[str, Any], where: str) -> Document:
    if value.get("messages") is not None:
        return Document("", where, messages=_parse_messages(value["messages"], where))
    if value.get("prompt") is not None and value.get("completion") is not None:
        prompt = check_text(value["prompt"], where, "prompt")
        return answered(prompt, check_text(value["completion"], where, "completion"), where)
    if "text" not in value:
        raise BadLineError(f'{where}: the object has no "text": expected {FORMS}')
    return Document(check_text(value["text"], where, "text"), where)


LINES = Form(("text", "prompt", "completion", "messages"), _parse)


def answered(prompt: str, completion: str, where: str) -> Document:
    """A document that is a prompt and, right after it, what answers it."""
    text = prompt + completion
    return Document(text, where, completions=((len(prompt), len(text)),))


def check_text(value: Any, where: str, key: str) -> str:
    """A text, as JSON gave it under `key`.

    Raises:
        BadLineError: It is no string, or one that holds half a character.
    """
    if not isinstance(value, str):
        raise BadLineError(f'{where}: expected a string as "{key}", got {_kind(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLineError(f'{where}: "{key}" holds a lone surrogate') from error
    return value


def _parse_messages(value: Any, where: str) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else _kind(value)
        raise BadLineError(f'{where}: expected a list of messages as "messages", got {what}')
    messages = []
    for number, one in enumerate(value):
        place = f"messages[{number}]"
        if not isinstance(one, dict):
            raise BadLineError(
                f'{where}: {place}: expected {{"role": "...", "content": "..."}}, got {_kind(one)}'
            )
        role, content = (check_text(one.get(k), where, f"{place}.{k}") for k in ("role", "content"))
        messages.append(ChatMessage(role, content))
    return tuple(messages)


def _parse_json(raw: bytes, where: str) -> Any:
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"{where}: not JSON: {error}") from error


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        bytes: "bytes",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
