"""The file `latest`, which names the newest step, and a manifest that detects damage to `latest`.

`latest` contains only a number, and a wrong bit can change it to the number of another step. So the
manifest `latest_manifest.json` contains the number too. A save writes first the manifest, then
`latest`, and then the manifest again. Between its two writes, the manifest contains the new and the
previous number, so the two files agree after a crash at any moment.
"""

import re
from pathlib import Path

from checkpoint.files.checksums import seal, unseal
from common.files import replace_file

LATEST = "latest"
CHECK = "latest_manifest.json"
_STEP = re.compile(r"0|[1-9][0-9]*")
_REMEDY = f"remove {LATEST} and {CHECK} to resume from the newest complete step"


def expect_latest(path: Path) -> None:
    """Creates the manifest of `latest` if it is missing; call before `publish`.

    The manifest contains the number in `latest`, which a predecessor may have written, or no step.
    """
    if not (path / CHECK).exists():
        replace_file(path / CHECK, seal({"step": _parse(latest_text(path))}))


def write_latest(path: Path, step: int) -> None:
    """Writes `step` to `latest` and to the manifest; raises OSError if the disk fails."""
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
    """Raises ValueError if `latest` or its manifest is damaged, or if only one of them is missing.

    The error names the file. A missing `latest` is no error if the manifest names no step. A
    missing manifest is no error if `has_manifests` is false, that is, if no step under `path` has a
    manifest either: a predecessor (an older system, see docs/glossary.md) wrote no manifests.
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
    possible = (check["step"], check.get("before", check["step"]))  # None: no `latest` yet
    if (text is None or step is not None) and step in possible:
        return
    known = "no step" if check["step"] is None else check["step"]
    if text is None:
        raise ValueError(f"{path / LATEST}: no such file, but {CHECK} names {known}; {_REMEDY}")
    raise ValueError(
        f"{path / LATEST}: damaged: it holds {text[:40]!r}, but {CHECK} names {known}; {_REMEDY}"
    )


def _parse(text: str | None) -> int | None:
    """Returns the number in `text`, or None if `text` is None or not a number."""
    return int(text) if text is not None and _STEP.fullmatch(text) else None
