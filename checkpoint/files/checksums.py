"""Manifests: size and checksum of each file of a folder, so that none is read that is not whole.

A manifest is JSON that ends with a checksum of itself, and is compared to the byte. CRC-32 finds
every burst of wrong bits up to 32 long, and misses other damage once in 2^32; it runs at the speed
of memory on any processor. It finds damage, not forgery.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch

FORMAT = 1
_CHUNK = 1 << 22  # bytes of a file that are held together while it is summed
_SEAL = "zz_checksum"  # sorts last


class FileSum(NamedTuple):
    """The size of a file in bytes and its CRC-32 in hexadecimal digits."""

    size: int
    crc32: str


class SummingFile:
    """A file being written, as torch.save needs one, and the sum of what was written to it.

    `error` is the OSError that a write ended in, which torch hides behind its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._crc = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        size = memoryview(data).nbytes
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._size, self._crc = self._size + size, zlib.crc32(data, self._crc)
        return size

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise

    @property
    def sum(self) -> FileSum:
        return FileSum(self._size, f"{self._crc:08x}")


def save_summed(state: Any, path: Path) -> FileSum:
    """torch.save, flushed to disk; returns the sum of what was written, not of what the disk made
    of it. OSError names the file."""
    try:
        with path.open("wb") as file:
            summing = SummingFile(file)
            try:
                torch.save(state, cast(IO[bytes], summing))
            except RuntimeError as error:  # torch's own, also where it was the disk
                raise summing.error or error from error
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise named(error, path) from error
    return summing.sum


def sum_bytes(content: bytes) -> FileSum:
    """The sum of a file with that content."""
    return FileSum(len(content), f"{zlib.crc32(content):08x}")


def sum_file(path: Path) -> FileSum:
    """The sum of a file as it is, read in pieces. Raises OSError where it cannot be read."""
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileSum(size, f"{crc:08x}")


def check_size(path: Path, expected: FileSum, *, manifest: str) -> None:
    """ValueError, naming `path`, where it is missing or of another size than its manifest says."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but {manifest} lists it")
    size = path.stat().st_size
    if size != expected.size:
        raise ValueError(f"{path}: damaged: {size} bytes, {manifest} says {expected.size}")


def check_file(path: Path, expected: FileSum, *, manifest: str) -> None:
    """As `check_size`, and the whole file is read and its checksum compared."""
    check_size(path, expected, manifest=manifest)
    try:
        found = sum_file(path)
    except OSError as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    if found != expected:
        raise ValueError(
            f"{path}: damaged: its checksum is {found.crc32}, {manifest} says {expected.crc32}"
        )


def seal(body: Mapping[str, Any]) -> bytes:
    """`body` as a file that `unseal` accepts."""
    return _encode({**body, _SEAL: sum_bytes(_encode(body)).crc32})


def unseal(path: Path) -> dict[str, Any]:
    """What was sealed; ValueError, naming `path`, where it is missing or not to the byte that."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, expected a manifest") from error
    except OSError as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    try:
        body: dict[str, Any] = json.loads(content)
        del body[_SEAL]
        whole = seal(body) == content
    except Exception:  # what damage makes of JSON can be anything
        whole = False
    if not whole:
        raise ValueError(f"{path}: damaged: it is not the manifest that was written")
    if body.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {body.get('format')!r}, expected {FORMAT}")
    return body


def _encode(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def encode_sums(sums: Mapping[str, FileSum]) -> dict[str, dict[str, Any]]:
    """Sums by file name, as a manifest holds them."""
    return {name: one._asdict() for name, one in sums.items()}


def decode_sums(body: Mapping[str, Any]) -> dict[str, FileSum]:
    """The sums of a manifest by file name."""
    return {name: FileSum(**one) for name, one in body["files"].items()}


def named(error: OSError, path: Path) -> OSError:
    """The same error, with the file that it is about."""
    return OSError(error.errno, error.strerror or str(error), str(path))
