"""The README's table of flags is that of --help.

`python -m tests.cli.test_readme` prints it anew.
"""

import argparse
import hashlib
import re
from pathlib import Path

from arguments.train import train_parser

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
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
    for package in ROOT.glob("*/__init__.py"):
        if package.parent.name != "tests":
            assert f"{package.parent.name}/ " in text


def test_every_file_that_is_named_exists() -> None:
    """A name without a folder may stand in any folder of the project."""
    names = set(re.findall(r"[\w/]*\w\.(?:py|sh|sbatch)\b", README.read_text(encoding="utf-8")))
    files = [path.relative_to(ROOT) for path in ROOT.glob("[!.]*/**/*")]
    names -= {str(path) for path in files} | {path.name for path in files}
    assert {name for name in names if not (ROOT / name).exists()} == set()


def test_the_licence_is_apache_2_0_to_the_letter() -> None:
    """The checksum is that of apache.org/licenses/LICENSE-2.0.txt."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert "Apache License 2.0: see `LICENSE`." in README.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(flag_table(), end="")
