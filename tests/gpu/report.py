"""The rows, the status and the JSON of one check for a machine with a GPU.

A check is a module `tests.gpu.check_<number>_<name>` with a function `check(report, options)`. The
driver starts it in a process of its own, through `run_module`. The module ends with
`run_check(check)`, so that a person can start it, too:

    python -m tests.gpu.check_2_numerics --device cpu --limit 60 --json rows.json

The file of rows is written again after each row, so a check that hangs leaves the rows before it.
No check needs pytest, because a bare machine may lack it.
"""

import argparse
import faulthandler
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

OK, FAILED, NOT_HERE = "ok", "failed", "not here"
EXIT_STATUS = {OK: 0, FAILED: 1, NOT_HERE: 3}
# A check that hangs prints its stacks so many seconds before its limit, or at half of it.
_STACKS_BEFORE = 5.0


@dataclass(frozen=True)
class Options:
    """The options of a check.

    device: "cuda" or "cpu".
    quick: whether to run only the part that the default tests run.
    limit: the seconds after which the driver ends the check.
    """

    device: str
    quick: bool
    limit: float

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Row:
    """A row of the table: a measured value, or a condition that must hold.

    ok: whether the condition holds; None if the value has no limit.
    """

    name: str
    value: float | str | None = None
    unit: str = ""
    ok: bool | None = None
    note: str = ""


@dataclass
class CheckReport:
    """The rows of a check, and the reason `missing` if the check cannot run on this machine.

    file: the file that gets the rows as JSON; None for no file.
    is_complete: whether the check has ended.
    """

    rows: list[Row] = field(default_factory=list)
    missing: str = ""
    file: Path | None = None
    is_complete: bool = False

    def measure(self, name: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Adds a measured value that has no limit."""
        self._add(Row(name, value, unit, None, note))

    def expect(
        self,
        name: str,
        holds: bool,
        value: float | str | None = None,
        unit: str = "",
        note: str = "",
    ) -> None:
        """Adds a condition; the check fails if `holds` is false."""
        self._add(Row(name, value, unit, bool(holds), note))

    def not_here(self, reason: str) -> None:
        """Says why this machine cannot run the check; used if no row was added."""
        self.missing = reason

    @property
    def status(self) -> str:
        """Returns `failed` if a condition does not hold, `not here` without rows, else `ok`."""
        if any(row.ok is False for row in self.rows):
            return FAILED
        if self.rows:
            return OK
        return NOT_HERE if self.missing else FAILED

    def to_json(self) -> dict[str, object]:
        """Returns the status, the rows, the reason `missing` and whether the check has ended."""
        return {
            "status": self.status,
            "complete": self.is_complete,
            "missing": self.missing,
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self) -> None:
        """Writes the JSON to `file`."""
        if self.file is not None:
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.to_json()), encoding="utf-8")
            temporary.replace(self.file)  # the check can be killed at any time

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(format_row(row), flush=True)
        self.save()


def format_row(row: Row) -> str:
    """Returns a row as a line of text."""
    mark = {None: "     ", True: "ok   ", False: "FAIL "}[row.ok]
    value = f"{row.value:.6g}" if isinstance(row.value, float) else str(row.value or "")
    return f"{mark} {row.name:<56} {value:>12} {row.unit:<8} {row.note}".rstrip()


Check = Callable[[CheckReport, Options], None]


def run_check(check: Check, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a check with the options of the command line, and exits with `EXIT_STATUS`.

    If the check hangs, the process prints the stacks of all threads before the driver ends it. An
    exception becomes a row that failed.
    """
    _run(lambda: check, argv)


def run_module(module: str, argv: Sequence[str]) -> NoReturn:
    """Does the same for the check of `module`; the time limit and the rows include its import."""

    def load() -> Check:
        loaded: Check = importlib.import_module(module).check
        return loaded

    _run(load, argv)


def _run(load: Callable[[], Check], argv: Sequence[str] | None) -> NoReturn:
    parser = argparse.ArgumentParser(description="Runs one check.", allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="only what the default tests run")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args(argv)
    faulthandler.enable()
    # Never cancelled: if a library's thread keeps the process alive at its end, this shows it.
    faulthandler.dump_traceback_later(max(args.limit / 2, args.limit - _STACKS_BEFORE))
    report = CheckReport(file=args.json)
    try:
        load()(report, Options(args.device, args.quick, args.limit))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        report.expect(f"no exception ({type(error).__name__})", False, note=str(error)[:300])
    report.is_complete = True
    report.save()
    sys.exit(EXIT_STATUS[report.status])
