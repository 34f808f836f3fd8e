"""Atomic replacement of files: a reader sees the complete old or the complete new content."""

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

_TEMPORARY = r"\..+\.[0-9a-f]{32}\.tmp"


def replace_file(path: Path, content: bytes) -> None:
    """Replaces the content of `path` atomically, also if the process or the machine crashes.

    The new content is on disk when the function returns, so a power failure cannot lose it.

    Raises:
        OSError: the folder is not writable, or its disk is full.
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
    """Waits until a file, or a folder's list of files, is on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def leftover_files(folder: Path) -> list[Path]:
    """Returns the temporary files that a killed `replace_file` left in `folder`."""
    return [path for path in folder.glob(".*.tmp") if re.fullmatch(_TEMPORARY, path.name)]


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        ValueError: the file is not readable or holds no JSON object; the text names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
