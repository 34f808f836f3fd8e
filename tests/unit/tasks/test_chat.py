"""Tests the text of a conversation and its trained parts; the expected texts are literals."""

import copy
from typing import Any

import pytest
from tokenizers import processors

from tasks.sources.base import ChatMessage, Document
from tasks.tokenization.chat import ChatFormat, find_bot_turns
from tasks.tokenization.encoder import Encoder
from tests.support.data import tokenizer

ROLES = ("system", "user", "assistant", "user", "assistant")
SAID = ("be brief", "hello fox", "jumps", "why?", "over\na dog")
TALK = tuple(map(ChatMessage, ROLES, SAID))
OIG = "be brief\n<human>: hello fox\n<bot>: jumps\n<human>: why?\n<bot>: over\na dog"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BY_TEMPLATE = "[system]be brief[/][user]hello fox[/][assistant]jumps[/][user]why?[/]"


class Templated:
    """The small tokenizer with a chat template."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def __getattr__(self, name: str) -> Any:
        return getattr(tokenizer(), name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return tokenizer()(*args, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        options["chat_template"] = self.chat_template
        return tokenizer().apply_chat_template(messages, **options)


def parts(text: str, spans: Any) -> list[str]:
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (OIG, [" jumps\n", " over\na dog"]),
        ("<bot>: a\n<bot>:b\n<human>:", [" a\n", "b\n"]),
        ("<human>: only <bot>: in a line", []),
        ("\n<bot>:", [""]),
    ],
)
def test_turns_of_the_bot(text: str, turns: list[str]) -> None:
    spans = find_bot_turns(text)
    assert spans is not None
    assert parts(text, spans) == turns


def test_a_text_without_turns_has_none() -> None:
    assert find_bot_turns("no <bot>: at the beginning of a line") is None


def test_messages_without_a_template_are_of_oigs_form() -> None:
    document = Document("", "a:1", messages=TALK)
    chat = ChatFormat(tokenizer())
    assert chat.render(document) == OIG
    assert chat.find_completions(document, OIG) == find_bot_turns(OIG)


def test_messages_go_through_the_template() -> None:
    document = Document("", "a:1", messages=TALK[:4])
    chat = ChatFormat(Templated(TEMPLATE))
    assert chat.render(document) == BY_TEMPLATE
    assert parts(BY_TEMPLATE, chat.find_completions(document, BY_TEMPLATE)) == ["jumps[/]"]


def test_a_role_that_is_unknown_is_named() -> None:
    with pytest.raises(ValueError, match=r"^a:1: expected a role of user, .* got 'tool'$"):
        ChatFormat(tokenizer()).render(Document("", "a:1", messages=(ChatMessage("tool", "x"),)))


def test_a_template_that_refuses_is_named() -> None:
    chat = ChatFormat(Templated("{{ raise_exception('roles must\nalternate') }}"))
    with pytest.raises(ValueError, match=r"^a:1: the tokenizer's chat template: roles must altern"):
        chat.render(Document("", "a:1", messages=TALK))


def test_a_template_that_rewrites_what_was_said_is_told() -> None:
    chat = ChatFormat(Templated("{{ messages | length }}{{ messages[-1].content }}"))
    document = Document("", "a:1", messages=TALK)
    with pytest.raises(ValueError, match=r"^a:1: .*turn by turn.*: use --train-on all$"):
        chat.find_completions(document, chat.render(document))


# ---- which tokens are trained ----


def learned(document: Document, **options: Any) -> str:
    """Returns the trained tokens as text, in which a dot stands for each series of other tokens."""
    tokens, trained = Encoder(tokenizer(), **options).encode(document)
    out = ""
    for token, is_trained in zip(tokens.tolist(), trained.tolist(), strict=True):
        if is_trained:
            out += tokenizer().decode([token])
        elif not out.endswith("."):
            out += "."
    return out


PAIR = Document("quick brown fox", "a:1", completions=((5, 15),))


def test_answers_are_trained_and_what_ends_them() -> None:
    only = {"train_on": "completion"}
    talk = Document("", "a:1", messages=TALK)
    assert learned(Document(OIG, "a:1"), **only) == ". jumps\n. over\na dog<eos>"
    assert learned(talk, **only) == ". jumps\n. over\na dog<eos>"
    assert learned(Document("", "a:1", messages=TALK[:4]), **only) == ". jumps\n."
    assert learned(PAIR, **only) == ". brown fox<eos>"
    assert learned(PAIR, **only, separator="\n") == ". brown fox"
    assert learned(Document("quick", "a:1", completions=((5, 5),)), **only) == ".<eos>"


def test_spaces_in_an_answer_are_trained() -> None:
    """Spaces in an answer are trained, though GPT-NeoX's tokenizers omit them in token offsets."""
    trimming = copy.deepcopy(tokenizer())
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    code = Document("code:  if x:\n    go   ", "a:1", completions=((5, 22),))
    offsets = trimming(code.text, add_special_tokens=False, return_offsets_mapping=True)
    assert any(start == end for start, end in offsets["offset_mapping"])
    tokens, trained = Encoder(trimming, train_on="completion").encode(code)
    answer = tokenizer().decode(tokens[trained].tolist())
    assert answer == "  if x:\n    go   <eos>"
    assert trimming.backend_tokenizer.post_processor is not None, (
        "the caller's tokenizer is unchanged"
    )


def test_a_text_that_is_no_conversation_is_trained_whole() -> None:
    assert learned(Document("quick fox", "a:1"), train_on="completion") == "quick fox<eos>"
    assert learned(PAIR) == "quick brown fox<eos>"


def test_a_tokenizer_that_knows_no_characters_is_refused() -> None:
    class Slow:
        eos_token_id, is_fast = 0, False

    with pytest.raises(ValueError, match="--train-on completion: expected a tokenizer"):
        Encoder(Slow(), train_on="completion")
    Encoder(Slow())


def test_an_assistant_that_speaks_first_does_not_learn_its_header() -> None:
    said = (("assistant", "hello"), ("user", "fox"), ("assistant", "dog"))
    document = Document("", "a:1", messages=tuple(ChatMessage(*one) for one in said))
    template = (
        "start{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = ChatFormat(Templated(template))
    text = chat.render(document)
    assert parts(text, chat.find_completions(document, text)) == ["hello;", "dog;"]


def test_a_template_that_ends_the_text_does_so_once() -> None:
    ending = Templated(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>"
        "{% else %}: {% endif %}{% endfor %}"
    )
    talk = (ChatMessage("user", "fox"), ChatMessage("assistant", "dog"))
    document = Document("", "a:1", messages=talk)
    assert ChatFormat(ending).render(document) == "fox: dog<eos>"
    for train_on in ("all", "completion"):
        tokens, trained = Encoder(ending, train_on=train_on).encode(document)
        assert tokens.tolist() == tokenizer()("fox: dog")["input_ids"] + [0]
        assert trained[-1]
    assert Encoder(ending, "\n").encode(document).token_ids[-1] == 0
