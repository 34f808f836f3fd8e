"""Checksums of files, and manifests: JSON files that list other files with their checksums.

A checksum detects an incomplete or damaged file before the file's content is used. A manifest also
has a checksum of its own content, so damage to any byte of the manifest is detected. CRC-32 detects
all damage within 32 neighbouring bits, and misses one in 2^32 cases of other damage. A CRC-32
is computed about as fast as memory is read. CRC-32 does not detect a change made on purpose.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch

FORMAT = 1
_CHUNK = 1 << 22  # bytes of a file that are read at once for its checksum
_SEAL = "zz_checksum"  # sorts last


class FileSum(NamedTuple):
    """The size of a file in bytes and its CRC-32 in hexadecimal digits."""

    size: int
    crc32: str


class SummingFile:
    """A writable file for torch.save that computes the checksum of the written bytes.

    `error` is the OSError of a failed write; torch.save raises a RuntimeError in its place.
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
    """Saves `state` with torch.save, flushes the file to disk, and returns the file's checksum.

    The checksum is computed before the bytes reach the disk, so a later check of the file detects
    bytes that the disk changed.

    Raises:
        OSError: the disk fails; the error names the file.
    """
    try:
        with path.open("wb") as file:
            summing = SummingFile(file)
            try:
                torch.save(state, cast(IO[bytes], summing))
            except RuntimeError as error:  # torch raises RuntimeError also if the disk fails
                raise summing.error or error from error
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise with_path(error, path) from error
    return summing.sum


def sum_bytes(content: bytes) -> FileSum:
    """Returns the checksum of a file that contains `content`."""
    return FileSum(len(content), f"{zlib.crc32(content):08x}")


def sum_file(path: Path) -> FileSum:
    """Reads a file in chunks and returns its checksum; raises OSError if reading fails."""
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileSum(size, f"{crc:08x}")


def check_size(path: Path, expected: FileSum, *, manifest: str) -> None:
    """Raises ValueError if the file is missing or its size differs from `expected`.

    `manifest` is the name of the manifest that lists the file. An error names file and manifest.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but {manifest} lists it")
    size = path.stat().st_size
    if size != expected.size:
        raise ValueError(f"{path}: damaged: {size} bytes, {manifest} says {expected.size}")


def check_file(path: Path, expected: FileSum, *, manifest: str) -> None:
    """Reads a file; raises ValueError if its size or checksum differs from `expected`.

    `manifest` is the name of the manifest that lists the file. An error names file and manifest.
    """
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
    """Returns `body` as JSON with two more fields: the format number and a checksum of the rest."""
    body = {"format": FORMAT, **body}
    return _encode({**body, _SEAL: sum_bytes(_encode(body)).crc32})


def unseal(path: Path) -> dict[str, Any]:
    """Returns the content of a file that `seal` encoded.

    Raises:
        ValueError: the file is missing, not readable, damaged in any byte, or of another format.
            The text names the file.
    """
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
        raise ValueError(f"{path}: damaged: its content does not match its own checksum")
    if body.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {body.get('format')!r}, expected {FORMAT}")
    return body


def _encode(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def encode_sums(sums: Mapping[str, FileSum]) -> dict[str, dict[str, Any]]:
    """Converts each file's checksum to a dict, the form in which a manifest stores it."""
    return {name: file_sum._asdict() for name, file_sum in sums.items()}


def decode_sums(body: Mapping[str, Any]) -> dict[str, FileSum]:
    """Returns the checksums that a manifest lists, by file name; `body` is the manifest."""
    return {name: FileSum(**file_sum) for name, file_sum in body["files"].items()}


def with_path(error: OSError, path: Path) -> OSError:
    """Returns a copy of `error` that names the file `path`."""
    return OSError(error.errno, error.strerror or str(error), str(path))
