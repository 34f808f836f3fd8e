"""The README's table of flags is that of --help; `python -m tests.test_readme` prints it anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from arguments.train import train_parser

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- flags: begin -->\n", "<!-- flags: end -->"


def default_of(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default is None or action.default is argparse.SUPPRESS:
        return ""
    value = action.default
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def flag_table() -> str:
    lines = ["| flag | default | |", "|---|---|---|"]
    for action in train_parser(shows_all=True)._actions:
        flag = action.option_strings[-1]
        if flag in ("--help", "--help-all", "--version"):
            continue
        lines.append(f"| {flag} | {default_of(action)} | {action.help} |")
    return "\n".join(lines) + "\n"


def test_the_flags_of_the_readme_are_those_of_help() -> None:
    text = README.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == flag_table()


def test_every_package_of_the_picture_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    for package in README.parent.glob("*/__init__.py"):
        if package.parent.name != "tests":
            assert f"{package.parent.name}/ " in text


if __name__ == "__main__":
    print(flag_table(), end="")
