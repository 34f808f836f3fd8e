"""`latest`, the file that names the newest step, and what tells a damaged one from a late one.

`latest` holds a bare number, so a wrong bit can make it the name of another step.
`latest_manifest.json` holds the number too, and while `latest` moves, the one before as well: it is
written before `latest` is, and again after it, so that a crash at any moment leaves what it holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.files.checksums import FORMAT, seal, unseal
from common.files import replace_file

LATEST = "latest"
CHECK = "latest_manifest.json"
_STEP = re.compile(r"0|[1-9][0-9]*")
_REMEDY = f"remove {LATEST} and {CHECK} to go on from the newest whole step"


def expect_latest(path: Path) -> None:
    """Before the first step's folder gets its name: from then on `path` is to have both files."""
    if not (path / CHECK).exists():
        _write_check(path, {"step": None})


def write_latest(path: Path, step: int) -> None:
    """Lets `latest` name `step`. OSError where the disk fails."""
    text = latest_text(path)
    if text is None or _STEP.fullmatch(text):  # else damaged while the run went on
        _write_check(path, {"step": step, "before": None if text is None else int(text)})
    replace_file(path / LATEST, str(step).encode())
    _write_check(path, {"step": step})


def latest_text(path: Path) -> str | None:
    """What `latest` holds, unchecked; None where there is none."""
    try:
        return (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def check_latest(path: Path, *, has_manifests: bool) -> None:
    """ValueError names `latest` or its manifest where one is missing or not as it was written.

    `has_manifests` is whether a step under `path` has manifests; where none has, and there is no
    manifest of `latest` either, nothing can be told.
    """
    text = latest_text(path)
    if not (path / CHECK).exists():
        if has_manifests and text is not None:
            raise ValueError(f"{path / CHECK}: no such file; {_REMEDY}")
        return
    try:
        check = unseal(path / CHECK)
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error
    if _is_possible(path, text, check):
        return
    known = "nothing yet" if check["step"] is None else check["step"]
    if text is None:
        raise ValueError(f"{path / LATEST}: no such file, {CHECK} says {known}; {_REMEDY}")
    raise ValueError(
        f"{path / LATEST}: damaged: it holds {text[:40]!r}, {CHECK} says {known}; {_REMEDY}"
    )


def _is_possible(path: Path, text: str | None, check: Mapping[str, Any]) -> bool:
    """Whether no damage is needed for `latest` to hold `text`; None is that it is not there."""
    if text is not None and not _STEP.fullmatch(text):
        return False
    held, known = None if text is None else int(text), check["step"]
    if held in (known, check.get("before", known)):
        return True
    # Versions that did not write the step before wrote a higher one to `latest` first.
    there = (path / f"{text}").is_dir() or (path / f"checkpoint_{text}").is_dir()
    return there and held is not None and (known is None or held > known)


def _write_check(path: Path, body: Mapping[str, Any]) -> None:
    replace_file(path / CHECK, seal({"format": FORMAT, **body}))
