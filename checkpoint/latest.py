"""`latest`, the file that names the newest step, and what tells a damaged one from a late one.

`latest` holds a bare number, so a wrong bit can make it the name of another step.
`latest_manifest.json` holds the number too. It is written so that after a crash at any moment
`latest` is never behind it: after `latest` where the number rises, before it where it falls.
"""

from __future__ import annotations

import re
from pathlib import Path

from checkpoint.manifest import FORMAT, seal, unseal
from monitor.atomic import replace_file

LATEST = "latest"
CHECK = "latest_manifest.json"
_REMEDY = f"remove {LATEST} and {CHECK} to go on from the newest whole step"


def expect_latest(path: Path) -> None:
    """Before the first step's folder gets its name: from then on `path` is to have both files."""
    if not (path / CHECK).exists():
        _write_check(path, None)


def write_latest(path: Path, step: int) -> None:
    """Lets `latest` name `step`. OSError where the disk fails."""
    try:
        known = _read_check(path)
    except ValueError:  # damaged while the run went on: it is written anew
        known = None
    falls = known is not None and step < known
    if falls:
        _write_check(path, step)
    replace_file(path / LATEST, str(step).encode())
    if not falls:
        _write_check(path, step)


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
        known = _read_check(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error
    if text is None and known is not None:
        raise ValueError(f"{path / LATEST}: no such file, {CHECK} says {known}; {_REMEDY}")
    if text is not None and not _is_possible(path, text, known):
        raise ValueError(
            f"{path / LATEST}: damaged: it holds {text[:40]!r}, {CHECK} says "
            f"{'nothing yet' if known is None else known}; {_REMEDY}"
        )


def _is_possible(path: Path, text: str, known: int | None) -> bool:
    """Whether no damage is needed for `latest` to hold `text`."""
    if not re.fullmatch(r"0|[1-9][0-9]*", text):
        return False
    step = int(text)
    if step == known:
        return True
    there = (path / text).is_dir() or (path / f"checkpoint_{text}").is_dir()
    return there and (known is None or step > known)


def _write_check(path: Path, step: int | None) -> None:
    replace_file(path / CHECK, seal({"format": FORMAT, "step": step}))


def _read_check(path: Path) -> int | None:
    if not (path / CHECK).exists():
        return None
    step: int | None = unseal(path / CHECK)["step"]
    return step
