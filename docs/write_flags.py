"""Writes docs/reference/flags.md from the flag table.

python docs/write_flags.py            writes the page
python docs/write_flags.py --check    exits with status 1 if the page does not match the table
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from arguments.flag import SWITCHES, Flag  # noqa: E402
from arguments.flag_table import FLAGS_BY_HEADING  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "flags.md"
INTRODUCTION = """\
# Flags

All flags of `dist_clm_train.py`. `python docs/write_flags.py` writes this page from the flag table
of the program; do not edit it by hand. `--help` shows the flags that most runs need, `--help-all`
shows all of them.

A switch takes an optional `true` or `false`; without a value it means `true`. Flags cannot be
abbreviated.

- **Resume** is the rule for a run that resumes with another value. *fixed*: it is an error.
  *free*: the run continues, and the log names the change. *-*: another rule applies.
  `--fp16`, `--bf16`, `--train-on` and `--pack` may not change either.
  [Checkpoints](../guides/checkpoints.md#which-flags-may-change) has all rules.
- **Ranks** is the rule for ranks with different values. *same*: all ranks need the same value, or
  the job does not start. *own*: each rank may have its own. *secret*: all ranks need the same
  value; they prove it to each other and never send it.
"""
TITLES = """\
| flag | meaning | values | default | resume | ranks |
|---|---|---|---|---|---|
"""
RESUME = {"must match": "fixed", "may change": "free", "not kept": "-"}
RANKS = {"same": "same", "own": "own", "proven": "secret"}


def flags_page() -> str:
    """Returns the page: a table for each heading of --help."""
    parts = [INTRODUCTION]
    for heading, flags in FLAGS_BY_HEADING.items():
        rows = "".join(map(_row, flags))
        parts.append(f"## {heading.capitalize()}\n\n{TITLES}{rows}")
    return "\n".join(parts)


def _row(flag: Flag) -> str:
    cells = [
        f"`{flag.name}`",
        flag.help.replace("|", "\\|"),
        _values(flag),
        "required" if flag.required else _default(flag.default),
        RESUME[flag.resume],
        RANKS[flag.ranks],
    ]
    return f"| {' | '.join(cells)} |\n"


def _values(flag: Flag) -> str:
    if flag.type is not None and flag.type in SWITCHES:
        return ", ".join(SWITCHES[flag.type])
    return ", ".join(map(str, flag.choices)) if flag.choices is not None else ""


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str]) -> int:
    """Writes the page, or checks it; returns the exit status."""
    if arguments == ["--check"]:
        return int(PAGE.read_text(encoding="utf-8") != flags_page())
    PAGE.write_text(flags_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
