"""Conversations: as one text, and which parts of it the model is to learn to say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tasks.sources.base import BadLineError, ChatMessage, Document

Spans = tuple[tuple[int, int], ...]

HUMAN, BOT = "<human>:", "<bot>:"
_TURN = re.compile(rf"^(?:{re.escape(HUMAN)}|{re.escape(BOT)})", re.MULTILINE)
_MARKS = {"user": f"{HUMAN} ", "assistant": f"{BOT} ", "system": ""}


def bot_turns(text: str) -> Spans | None:
    """What the bot says in a text of OIG's form, each turn with the line's end after it.

    A turn begins with HUMAN or BOT at the beginning of a line. None where no turn begins.
    """
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    pairs = zip(marks, ends, strict=True) if marks else ()
    spans = tuple((mark.end(), end) for mark, end in pairs if mark[0] == BOT)
    return spans if marks else None


class ChatFormat:
    """Makes texts of messages: by the tokenizer's chat template, or in OIG's form without one."""

    def __init__(self, tokenizer: Any) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer = tokenizer if has_template else None

    def text(self, document: Document) -> str:
        """The text of a document's messages.

        Raises:
            BadLineError: A role is unknown, or the template refuses the conversation.
        """
        assert document.messages is not None
        if self._tokenizer is not None:
            return self._render(document.messages, document.where)
        return "\n".join(_marked(message, document.where) for message in document.messages)

    def ends(self, text: str) -> bool:
        """Whether a template wrote an end of text after the last turn, and nothing after it."""
        if self._tokenizer is None or not self._tokenizer.eos_token:
            return False
        return text.endswith(self._tokenizer.eos_token)

    def completions(self, document: Document, text: str) -> Spans:
        """Where in `text`, which `text` made, the assistant speaks.

        Raises:
            BadLineError: The template does not write a conversation turn by turn.
        """
        assert document.messages is not None
        if self._tokenizer is not None:
            return tuple(self._spans(document.messages, text, document.where))
        spans, start = [], 0
        for message in document.messages:
            mark = _MARKS[message.role]
            end = start + len(mark) + len(message.content)
            if message.role == "assistant":
                spans.append((start + len(BOT), min(end + 1, len(text))))
            start = end + 1
        return tuple(spans)

    def _spans(
        self, messages: Sequence[ChatMessage], text: str, where: str
    ) -> list[tuple[int, int]]:
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = (
                self._render(messages[:index], where, is_next=True)
                if index
                else self._before_first(message, where)
            )
            until = self._render(messages[: index + 1], where)
            if not (until.startswith(before) and text.startswith(until)):
                raise BadLineError(
                    f"{where}: the tokenizer's chat template does not write this conversation turn "
                    "by turn, so that what the assistant says cannot be told from the rest: "
                    "--train-on all can"
                )
            spans.append((len(before), len(until)))
        return spans

    def _before_first(self, message: ChatMessage, where: str) -> str:
        """What is written until an assistant speaks that speaks first: no template takes an empty
        conversation, but what asks for its turn after this one is there before it, too."""
        alone = self._render([message], where)
        asked = self._render([message], where, is_next=True)
        header = asked[len(alone) :] if asked.startswith(alone) else ""
        return alone[: alone.find(header) + len(header)] if header in alone else ""

    def _render(self, messages: Sequence[ChatMessage], where: str, *, is_next: bool = False) -> str:
        assert self._tokenizer is not None
        try:
            text: str = self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                tokenize=False,
                add_generation_prompt=is_next,
            )
        except Exception as error:  # a template raises what it likes
            why = " ".join(str(error).split())
            raise BadLineError(f"{where}: the tokenizer's chat template: {why}") from error
        return text


def _marked(message: ChatMessage, where: str) -> str:
    if message.role not in _MARKS:
        raise BadLineError(
            f"{where}: expected a role of {', '.join(_MARKS)} (the tokenizer has no chat template),"
            f" got {message.role!a}"
        )
    return _MARKS[message.role] + message.content
