"""A converter's wrong flag gets one line, with what was expected, and exit status 2."""

from collections.abc import Callable

import pytest

from arguments.conversion import parse_convert_from_hf, parse_convert_to_hf
from tests.support.valid_run import the_line

Cases = dict[str, tuple[list[str], list[str]]]  # the flags given, and what the line must hold

PLACES_FROM = ["--model-name", "a", "--save-dir", "b"]
PLACES_TO = ["--ckpt-path", "a", "--save-path", "b"]
FROM: Cases = {
    "no model": (["--save-dir", "a"], ["--model-name", "required"]),
    "no place": (["--model-name", "a"], ["--save-dir", "required"]),
    "another type": (
        [*PLACES_FROM, "--dtype", "int8"], ["--dtype", "'int8'", "keep", "fp16", "bf16", "fp32"],
    ),
    "an unknown flag": ([*PLACES_FROM, "--offload"], ["--offload", "unrecognized"]),
}  # fmt: skip
WHOLE = "whole number of at least 1"
TO: Cases = {
    "no checkpoint": (["--save-path", "a"], ["--ckpt-path", "required"]),
    "no place": (["--ckpt-path", "a"], ["--save-path", "required"]),
    "no switch": ([*PLACES_TO, "--fp16", "yes"], ["--fp16", "true or false", "'yes'"]),
    "no stages": ([*PLACES_TO, "--n-stages", "0"], ["--n-stages", WHOLE, "'0'"]),
    **{
        f"layers of {value}": (
            [*PLACES_TO, "--n-layer-per-stage", value],
            ["--n-layer-per-stage", expected, f"'{value}'"],
        )
        for value, expected in (
            ("few", WHOLE),
            ("-1", WHOLE),
            ("2,,1", "as in 5,3"),
            ("2,0", "at least 1"),
            ("auto", "as in 5,3"),
        )
    },
}


@pytest.mark.parametrize("name", FROM)
@pytest.mark.parametrize("family", ["gptj", "gptneox"])
def test_from_hf(family: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(parse_convert_from_hf, family, *FROM[name], capsys)


@pytest.mark.parametrize("name", TO)
@pytest.mark.parametrize("family", ["gptj", "gptneox"])
def test_to_hf(family: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(parse_convert_to_hf, family, *TO[name], capsys)


def check(
    parse: Callable[[str, list[str]], object],
    family: str,
    given: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(family, given)
    assert ended.value.code == 2
    line = the_line(capsys.readouterr().err)
    assert all(word in line for word in words), line
