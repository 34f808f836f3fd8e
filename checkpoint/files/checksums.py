"""Checksums of files, and manifests that hold them, so that no incomplete file is ever read.

A manifest is JSON that ends with a checksum of itself, and is compared byte by byte. CRC-32 finds
every burst of wrong bits up to 32 long, and misses other damage once in 2^32; it runs at the speed
of memory on any processor. It finds damage, not forgery.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch

FORMAT = 1
_CHUNK = 1 << 22  # bytes of a file that are in memory together while its checksum is computed
_SEAL = "zz_checksum"  # sorts last


class FileSum(NamedTuple):
    """The size of a file in bytes and its CRC-32 in hexadecimal digits."""

    size: int
    crc32: str


class SummingFile:
    """A writable file for torch.save that computes the checksum of everything written to it.

    `error` is the OSError of a failed write, which torch hides behind an error of its own.
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
    """Saves `state` with torch.save and flushes it to disk; an OSError names the file.

    Returns the checksum of the bytes in memory, so that a later check finds what the disk changed.
    """
    try:
        with path.open("wb") as file:
            summing = SummingFile(file)
            try:
                torch.save(state, cast(IO[bytes], summing))
            except RuntimeError as error:  # torch raises its own, also where the disk failed
                raise summing.error or error from error
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise with_path(error, path) from error
    return summing.sum


def sum_bytes(content: bytes) -> FileSum:
    """Returns the checksum of a file with that content."""
    return FileSum(len(content), f"{zlib.crc32(content):08x}")


def sum_file(path: Path) -> FileSum:
    """Reads a file in chunks and returns its checksum; OSError if it cannot be read."""
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileSum(size, f"{crc:08x}")


def check_size(path: Path, expected: FileSum, *, manifest: str) -> None:
    """Raises ValueError, naming `path`, if it is missing or its size differs from its manifest."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but {manifest} lists it")
    size = path.stat().st_size
    if size != expected.size:
        raise ValueError(f"{path}: damaged: {size} bytes, {manifest} says {expected.size}")


def check_file(path: Path, expected: FileSum, *, manifest: str) -> None:
    """Checks the size, then reads the complete file and compares its checksum; ValueError."""
    check_size(path, expected, manifest=manifest)
    try:
        actual = sum_file(path)
    except OSError as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    if actual != expected:
        raise ValueError(
            f"{path}: damaged: its checksum is {actual.crc32}, {manifest} says {expected.crc32}"
        )


def seal(body: Mapping[str, Any]) -> bytes:
    """Encodes `body` and the format as JSON with a checksum of itself, for `unseal`."""
    body = {"format": FORMAT, **body}
    return _encode({**body, _SEAL: sum_bytes(_encode(body)).crc32})


def unseal(path: Path) -> dict[str, Any]:
    """Reads a sealed file; ValueError, naming `path`, if it is missing or differs in any byte."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, expected a manifest") from error
    except OSError as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    try:
        body: dict[str, Any] = json.loads(content)
        del body[_SEAL]
        is_intact = seal(body) == content
    except Exception:  # damage can turn JSON into anything
        is_intact = False
    if not is_intact:
        raise ValueError(f"{path}: damaged: it is not the manifest that was written")
    if body.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {body.get('format')!r}, expected {FORMAT}")
    return body


def _encode(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def encode_sums(sums: Mapping[str, FileSum]) -> dict[str, dict[str, Any]]:
    """Encodes checksums by file name for a manifest."""
    return {name: file_sum._asdict() for name, file_sum in sums.items()}


def decode_sums(body: Mapping[str, Any]) -> dict[str, FileSum]:
    """Returns a manifest's checksums by file name."""
    return {name: FileSum(**file_sum) for name, file_sum in body["files"].items()}


def with_path(error: OSError, path: Path) -> OSError:
    """Returns the same error with the name of the file that it is about."""
    return OSError(error.errno, error.strerror or str(error), str(path))
