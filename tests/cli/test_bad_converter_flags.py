"""Tests that a wrong flag ends a converter with status 2 and an error line that names the flag."""

from collections.abc import Callable

import pytest

from arguments.conversion import parse_convert_from_hf, parse_convert_to_hf
from tests.support.valid_run import the_line

Parse = Callable[[str | None, list[str]], object]

# the given flags | words that the error line must contain
FROM_HF = """
--save-dir a | --model-name | required
--model-name a | --save-dir | required
--model-name a --save-dir b --dtype int8 | --dtype | 'int8' | keep | fp16 | bf16 | fp32
--model-name a --save-dir b --offload | --offload | unrecognized
"""
TO_HF = """
--save-path a | --ckpt-path | required
--ckpt-path a | --save-path | required
--ckpt-path a --save-path b --fp16 yes | --fp16 | true or false | 'yes'
--ckpt-path a --save-path b --n-stages 0 | --n-stages | whole number of at least 1 | '0'
--ckpt-path a --save-path b --n-layer-per-stage few | --n-layer-per-stage | whole number | 'few'
--ckpt-path a --save-path b --n-layer-per-stage -1 | --n-layer-per-stage | at least 1 | '-1'
--ckpt-path a --save-path b --n-layer-per-stage 2,,1 | --n-layer-per-stage | as in 5,3 | '2,,1'
--ckpt-path a --save-path b --n-layer-per-stage 2,0 | --n-layer-per-stage | at least 1 | '2,0'
--ckpt-path a --save-path b --n-layer-per-stage auto | --n-layer-per-stage | as in 5,3 | 'auto'
"""
CASES = [
    (parse, line)
    for parse, lines in ((parse_convert_from_hf, FROM_HF), (parse_convert_to_hf, TO_HF))
    for line in lines.strip().splitlines()
]


@pytest.mark.parametrize("family", ["gptj", "gptneox", None])
@pytest.mark.parametrize(("parse", "line"), CASES)
def test_a_flag(
    parse: Parse, line: str, family: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, *words = line.split(" | ")
    with pytest.raises(SystemExit) as ended:
        parse(family, flags.split())
    assert ended.value.code == 2
    told = the_line(capsys.readouterr().err)
    assert all(word in told for word in words), told
