"""What a line, or a row of a table, says: {"text"}, {"prompt", "completion"} or {"messages"}.

Of several, messages go first, then prompt and completion; what else there is does not count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tasks.source import BadLineError, Document, Message

FORMS = '{"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [...]}'


def parse_line(raw: bytes, where: str) -> Document | BadLineError:
    """The document of a line, or what is wrong: it is none of FORMS in UTF-8."""
    try:
        return _parse(_parse_json(raw, where), where)
    except BadLineError as error:
        return error


def parse_row(value: Mapping[str, Any], where: str) -> Document | BadLineError:
    """The same of a table's row."""
    try:
        return _parse(value, where)
    except BadLineError as error:
        return error


def _parse(value: Any, where: str) -> Document:
    if not isinstance(value, Mapping):
        raise BadLineError(f"{where}: expected an object, {FORMS}, got {_kind(value)}")
    if value.get("messages") is not None:
        return Document("", where, messages=_parse_messages(value["messages"], where))
    if value.get("prompt") is not None and value.get("completion") is not None:
        prompt = check_text(value["prompt"], where, "prompt")
        text = prompt + check_text(value["completion"], where, "completion")
        return Document(text, where, completions=((len(prompt), len(text)),))
    if "text" not in value:
        raise BadLineError(f'{where}: the object has no "text": expected {FORMS}')
    return Document(check_text(value["text"], where, "text"), where)


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


def _parse_messages(value: Any, where: str) -> tuple[Message, ...]:
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
        messages.append(Message(role, content))
    return tuple(messages)


def _parse_json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"{where}: not JSON: {error}") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
