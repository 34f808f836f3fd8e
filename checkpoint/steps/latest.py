"""`latest`, the file that names the newest step, and the manifest that detects damage to it.

`latest` holds a bare number, so a wrong bit can make it the name of another step.
`latest_manifest.json` holds the number too and, while `latest` changes, the previous number: it is
written before `latest` and again after it, so that after a crash at any moment the two agree.
"""

import re
from pathlib import Path

from checkpoint.files.checksums import seal, unseal
from common.files import replace_file

LATEST = "latest"
CHECK = "latest_manifest.json"
_STEP = re.compile(r"0|[1-9][0-9]*")
_REMEDY = f"remove {LATEST} and {CHECK} to go on from the newest complete step"


def expect_latest(path: Path) -> None:
    """Creates the manifest before the first step is published: from then on both files exist."""
    if not (path / CHECK).exists():
        replace_file(path / CHECK, seal({"step": None}))


def write_latest(path: Path, step: int) -> None:
    """Makes `latest` name `step`; OSError if the disk fails."""
    before = _parse(latest_text(path))
    replace_file(path / CHECK, seal({"step": step, "before": before}))
    replace_file(path / LATEST, str(step).encode())
    replace_file(path / CHECK, seal({"step": step}))


def latest_text(path: Path) -> str | None:
    """Returns the unchecked text of `latest`, or None if there is no such file."""
    try:
        return (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def check_latest(path: Path, *, has_manifests: bool) -> None:
    """Raises ValueError, naming the file, if `latest` or its manifest is missing or damaged.

    `has_manifests` is whether any step under `path` has manifests. A predecessor's steps have none,
    and its `latest` has no manifest either: nothing is checked then.
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
    step = _parse(text)
    possible = (check["step"], check.get("before", check["step"]))  # None for a missing `latest`
    if (text is None or step is not None) and step in possible:
        return
    known = "nothing yet" if check["step"] is None else check["step"]
    if text is None:
        raise ValueError(f"{path / LATEST}: no such file, {CHECK} says {known}; {_REMEDY}")
    raise ValueError(
        f"{path / LATEST}: damaged: it holds {text[:40]!r}, {CHECK} says {known}; {_REMEDY}"
    )


def _parse(text: str | None) -> int | None:
    """Returns the step that `text` spells, or None if it is missing or damaged."""
    return int(text) if text is not None and _STEP.fullmatch(text) else None
