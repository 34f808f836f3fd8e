"""Files that a reader sees either as they were or as they will be, never half written."""

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

_TEMPORARY = r"\..+\.[0-9a-f]{32}\.tmp"


def replace_file(path: Path, content: bytes) -> None:
    """Gives `path` the content at once, also for one who looks after a crash.

    It is on disk before anything that is written later, also where power is lost. Raises OSError
    where the folder cannot be written or its disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Lets a file, or a folder's entries, be on disk also where power is lost."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def leftover_files(folder: Path) -> list[Path]:
    """What a process that died while it replaced a file under `folder` left there."""
    return [path for path in folder.glob(".*.tmp") if re.fullmatch(_TEMPORARY, path.name)]


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, where it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
