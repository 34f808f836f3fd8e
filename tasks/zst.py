"""Decompression of zstd as a stream that knows a cut file from a whole one.

zstandard's own stream reader ends quietly where a file was cut; its decompression objects say
whether their frame is complete, so this stream is made of them.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import zstandard

# Compressed bytes per call. A call returns all that they hold: text that repeats shrinks more than
# ten thousandfold, so this, not the file, bounds the memory (to about 10 MB).
INPUT_BYTES = 512
MAX_WINDOW_BYTES = 1 << 31


class DamagedStream(Exception):
    """The compressed data is cut or is none; the text says which."""


class _ZstStream(io.RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
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
            raise DamagedStream("the zstd data is truncated")
        return bool(self._input)

    def _decompress(self) -> None:
        if self._frame is None:
            decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
            self._frame = decompressor.decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except zstandard.ZstdError as error:
            raise DamagedStream(f"not valid zstd data: {error}") from error
        self._input = self._frame.unused_data
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()


def open_zst(file: BinaryIO) -> BinaryIO:
    """`file` decompressed, of one or several frames; it is closed with the stream.

    Reading raises DamagedStream where the data is cut or is no zstd.
    """
    return io.BufferedReader(_ZstStream(file), 1 << 17)
