"""manifest.json of a folder of layer shards: what its files are to be, where it has one.

Published shards have none: they load unverified. A user who changes a file on purpose removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from checkpoint.files.checksums import (
    FORMAT,
    FileSum,
    check_file,
    check_size,
    decode_sums,
    encode_sums,
    seal,
    unseal,
)

NAME = "manifest.json"
_REMEDY = f"remove {NAME} to load the folder unverified"


def write_shard_manifest(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Writes the manifest of a folder whose files have these sums, by name."""
    (folder / NAME).write_bytes(seal({"format": FORMAT, "files": encode_sums(sums)}))


def has_manifest(folder: Path) -> bool:
    """Whether the files of a folder of shards can be checked."""
    return (folder / NAME).exists()


def check_shard(path: Path) -> None:
    """Reads a shard or config.json whole; ValueError, naming it, where it is not as written.

    Nothing is checked where its folder has no manifest; one that does not list it is an error too.
    """
    _check_listed(path, check_file)


def check_shard_size(path: Path) -> None:
    """As `check_shard`, of the size alone, with nothing of the file read."""
    _check_listed(path, check_size)


def check_companions(folder: Path) -> None:
    """As `check_shard`, of the tokenizer's files and the generation settings that are listed."""
    if not has_manifest(folder):
        return
    for name, expected in sorted(_read(folder).items()):
        if not name.startswith("pytorch_") and name != "config.json":
            _check(folder / name, expected, check_file)


def _check_listed(path: Path, check: Callable[..., None]) -> None:
    if not has_manifest(path.parent):
        return
    sums = _read(path.parent)
    if path.name not in sums:
        raise ValueError(f"{path}: not one of the files that {NAME} lists; {_REMEDY}")
    _check(path, sums[path.name], check)


def _read(folder: Path) -> dict[str, FileSum]:
    try:
        return decode_sums(unseal(folder / NAME))
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error


def _check(path: Path, expected: FileSum, check: Callable[..., None]) -> None:
    try:
        check(path, expected, manifest=NAME)
    except ValueError as error:
        raise ValueError(f"{error}; convert the model again, or {_REMEDY}") from error
