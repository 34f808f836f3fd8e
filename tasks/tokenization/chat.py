"""Chat formats: how a conversation becomes a text, and where the assistant's turns are in it."""

import re
from collections.abc import Sequence
from typing import Any

from common.text import one_line
from tasks.sources.base import BadLineError, ChatMessage, Document

Spans = tuple[tuple[int, int], ...]

HUMAN, BOT = "<human>:", "<bot>:"
_TURN = re.compile(rf"^(?:{re.escape(HUMAN)}|{re.escape(BOT)})", re.MULTILINE)
_MARKS = {"user": f"{HUMAN} ", "assistant": f"{BOT} ", "system": ""}


def find_bot_turns(text: str) -> Spans | None:
    """Returns the bot's turns in a text of OIG's format, each with the newline after it.

    In the chats of the data set OIG (Open Instruction Generalist), a turn begins with HUMAN or BOT
    at the beginning of a line. Returns None if the text has no turn.
    """
    marks = list(_TURN.finditer(text))
    if not marks:
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple((m.end(), end) for m, end in zip(marks, ends, strict=True) if m[0] == BOT)


class ChatFormat:
    """A renderer of messages as text; uses OIG's format if the tokenizer has no chat template."""

    def __init__(self, tokenizer: Any) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer = tokenizer if has_template else None

    def render(self, document: Document) -> str:
        """Returns the text of a document's messages; raises BadLineError if they are invalid."""
        assert document.messages is not None
        if self._tokenizer is not None:
            return self._apply_template(document.messages, document.origin)
        return "\n".join(_mark(message, document.origin) for message in document.messages)

    def has_end(self, text: str) -> bool:
        """Returns whether the chat template already added the end-of-text token to the text."""
        if self._tokenizer is None or not self._tokenizer.eos_token:
            return False
        return text.endswith(self._tokenizer.eos_token)

    def find_completions(self, document: Document, text: str) -> Spans:
        """Returns the assistant's turns in `text`; raises BadLineError if they cannot be found."""
        assert document.messages is not None
        if self._tokenizer is not None:
            return tuple(self._find_spans(document.messages, text, document.origin))
        spans, start = [], 0
        for message in document.messages:
            mark = _MARKS[message.role]
            end = start + len(mark) + len(message.content)
            if message.role == "assistant":
                spans.append((start + len(BOT), min(end + 1, len(text))))
            start = end + 1
        return tuple(spans)

    def _find_spans(
        self, messages: Sequence[ChatMessage], text: str, origin: str
    ) -> list[tuple[int, int]]:
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            if index:
                prefix = self._apply_template(messages[:index], origin, add_header=True)
            else:
                prefix = self._prefix_of_first(message, origin)
            turns = self._apply_template(messages[: index + 1], origin)
            if not (turns.startswith(prefix) and text.startswith(turns)):
                raise BadLineError(
                    f"{origin}: the tokenizer's chat template does not write this conversation "
                    "turn by turn, so the assistant's turns cannot be found: use --train-on all"
                )
            spans.append((len(prefix), len(turns)))
        return spans

    def _prefix_of_first(self, message: ChatMessage, origin: str) -> str:
        """Returns the text before the assistant's answer in `message`, the first of a conversation.

        A template cannot render an empty conversation. So this function lets the template add a
        header for an answer after `message`, and searches the rendered `message` for the same
        header. The result ends with this header; it is empty if the header is not found.
        """
        turn = self._apply_template([message], origin)
        with_header = self._apply_template([message], origin, add_header=True)
        header = with_header[len(turn) :] if with_header.startswith(turn) else ""
        return turn[: turn.find(header) + len(header)] if header in turn else ""

    def _apply_template(
        self, messages: Sequence[ChatMessage], origin: str, *, add_header: bool = False
    ) -> str:
        assert self._tokenizer is not None
        try:
            text: str = self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                tokenize=False,
                add_generation_prompt=add_header,
            )
        except Exception as error:  # a template raises many types of errors
            problem = f"the tokenizer's chat template: {one_line(error)}"
            raise BadLineError(f"{origin}: {problem}") from error
        return text


def _mark(message: ChatMessage, origin: str) -> str:
    if message.role not in _MARKS:
        raise BadLineError(
            f"{origin}: expected a role of {', '.join(_MARKS)} (the tokenizer has no chat "
            f"template), got {message.role!a}"
        )
    return _MARKS[message.role] + message.content
