"""A stream that decompresses a file and detects truncated data.

The stream reader of the library zstandard ends without an error if a file is truncated. The
decompression objects of zstandard and zlib report whether a frame (zstd) or member (gzip) is
complete, so this stream uses these objects.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import zstandard

# Compressed bytes per call. Repetitive text can be more than ten thousand times larger after
# decompression, so INPUT_BYTES limits the memory of a call to about 10 MB.
INPUT_BYTES = 512
MAX_WINDOW_BYTES = 1 << 31
GZIP_WBITS = 16 + zlib.MAX_WBITS  # zlib's number for the gzip format


class DamagedStream(Exception):
    """The error of compressed data that is truncated or invalid; the text gives the reason."""


@dataclass(frozen=True)
class _Codec:
    """A compression format.

    new_frame: creates a decompressor of one frame; it has decompress(bytes), eof and unused_data.
    """

    name: str
    new_frame: Callable[[], Any]
    error: type[Exception]


def _new_zstd_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()


_CODECS = {
    ".zst": _Codec("zstd", _new_zstd_frame, zstandard.ZstdError),
    ".gz": _Codec("gzip", lambda: zlib.decompressobj(GZIP_WBITS), zlib.error),
}


class _DecompressedStream(io.RawIOBase):
    def __init__(self, file: BinaryIO, codec: _Codec) -> None:
        self._file = file
        self._codec = codec
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
            raise DamagedStream(f"the {self._codec.name} data is truncated")
        return bool(self._input)

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._codec.new_frame()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._codec.error as error:
            raise DamagedStream(f"not valid {self._codec.name} data: {error}") from error
        self._input = self._frame.unused_data
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()


def open_decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """Returns a stream of a .zst or .gz file's decompressed data; returns any other file unchanged.

    A file may have several frames. Closing the stream also closes the file. A read raises
    DamagedStream if the data is damaged.
    """
    for suffix, codec in _CODECS.items():
        if name.endswith(suffix):
            return io.BufferedReader(_DecompressedStream(file, codec), 1 << 17)
    return file
