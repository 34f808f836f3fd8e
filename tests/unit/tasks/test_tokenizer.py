"""Tests loading a tokenizer, and the errors for one that is broken or has too many tokens."""

import json
from pathlib import Path

import pytest

from tasks.tokenization.tokenizer import check_vocabulary, load_tokenizer
from tests.support.data import tokenizer
from tests.support.refusal import refusal


def test_loaded_from_a_folder(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("the fox")["input_ids"] == tokenizer()("the fox")["input_ids"]
    assert loaded.eos_token_id == 0


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": {}}'])
def test_broken_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text(content)
    refused = refusal(lambda: load_tokenizer(str(tmp_path)))
    assert refused.startswith(f"--tokenizer-name {tmp_path}: ")


@pytest.mark.parametrize("model_type", ["gpt_neox", "gptj"])
def test_a_config_alone_is_no_tokenizer(tmp_path: Path, model_type: str) -> None:
    """A folder with only config.json is refused, because its tokenizer would have no tokens."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=r"--tokenizer-name .*: there are no tokenizer files"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["", "a b", "/no/such/folder", "./none"])
def test_no_folder_and_no_hub_name(name: str) -> None:
    assert "--tokenizer-name" in refusal(lambda: load_tokenizer(name))


def test_longer_than_the_vocabulary() -> None:
    check_vocabulary(tokenizer(), len(tokenizer()))
    with pytest.raises(ValueError, match=f"{len(tokenizer())} tokens, .* vocabulary of 300"):
        check_vocabulary(tokenizer(), 300)
