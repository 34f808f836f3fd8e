"""Decompression as a stream that knows a cut file from a whole one.

The libraries' own stream readers end quietly where a file was cut, or read all of it at once; their
decompression objects say whether their frame (zstd) or member (gzip) is complete, so this stream is
made of them.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import zstandard

# Compressed bytes per call. A call returns all that they hold: text that repeats shrinks more than
# ten thousandfold, so this, not the file, bounds the memory (to about 10 MB).
INPUT_BYTES = 512
MAX_WINDOW_BYTES = 1 << 31
GZIP = 16 + zlib.MAX_WBITS  # what zlib calls gzip's format


class DamagedStream(Exception):
    """The compressed data is cut or is none; the text says which."""


@dataclass(frozen=True)
class _Format:
    """`new_frame` makes what decompresses a frame: decompress(bytes), eof and unused_data."""

    name: str
    new_frame: Callable[[], Any]
    error: type[Exception]


def _new_zstd_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()


FORMATS = {
    ".zst": _Format("zstd", _new_zstd_frame, zstandard.ZstdError),
    ".gz": _Format("gzip", lambda: zlib.decompressobj(GZIP), zlib.error),
}


class _DecompressedStream(io.RawIOBase):
    def __init__(self, file: BinaryIO, kind: _Format) -> None:
        self._file = file
        self._kind = kind
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not self._refill():
                return 0
            self._decompress()
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _refill(self) -> bool:
        self._input = self._file.read(INPUT_BYTES)
        if not self._input and self._frame is not None:
            raise DamagedStream(f"the {self._kind.name} data is truncated")
        return bool(self._input)

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._kind.new_frame()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._kind.error as error:
            raise DamagedStream(f"not valid {self._kind.name} data: {error}") from error
        self._input = self._frame.unused_data
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """`file` as its name's end says: decompressed (.zst, .gz; one or several frames), or itself.

    It is closed with the stream. Reading raises DamagedStream where the data is cut or is none.
    """
    for suffix, kind in FORMATS.items():
        if name.endswith(suffix):
            return io.BufferedReader(_DecompressedStream(file, kind), 1 << 17)
    return file
