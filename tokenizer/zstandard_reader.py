"""Zstandard as the standard library's readers of other compressions are."""

import io
from typing import BinaryIO

import zstandard

_BLOCK = 1 << 20


class ZstandardReader(io.RawIOBase):
    """Frames of Zstandard one after the other. The library's own reader ends quietly on a truncated file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._started = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def, override]
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._started = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self._raw.read(_BLOCK)
            if not data:
                if self._started:
                    raise EOFError("the file ends before its last frame does")
                return 0
            self._started = True
            try:
                self._ready = self._frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(error) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
