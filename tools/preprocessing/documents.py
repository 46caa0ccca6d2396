"""Documents from files: JSON lines or plain text, plain or compressed, or standard input."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_ext.errors import RequestError

STDIN = "-"
CHUNK_BYTES = 256 << 10
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Neighbouring documents of one file, still undecoded: what a worker is given at a time.

    Attributes:
        name: of the file.
        first: line number of the first document (JSON lines), from 1.
        json_lines: each document is a line of JSON; else there is one document, the text itself.
        documents: bytes of each.
        consumed: bytes taken from the file as it lies on disk since the last chunk (compressed ones if compressed).
    """

    name: str
    first: int
    json_lines: bool
    documents: list[bytes]
    consumed: int


def is_json_lines(name: str) -> bool:
    """Whether a file holds JSON lines, by its name without `.gz` or `.zst`; standard input does."""
    stem = name.removesuffix(".gz").removesuffix(".zst")
    return name == STDIN or stem.endswith((".jsonl", ".json"))


def size_on_disk(names: Sequence[str]) -> int | None:
    """Bytes of all files, None when standard input is among them.

    Raises:
        RequestError: a file does not exist.
    """
    for name in names:
        if name != STDIN and not Path(name).is_file():
            what = "is not a file" if Path(name).exists() else "does not exist"
            raise RequestError(f"--input {name} {what}")
    if STDIN in names:
        return None
    return sum(Path(name).stat().st_size for name in names)


def read_chunks(names: Sequence[str]) -> Iterator[Chunk]:
    """The documents of the files, in order.

    Raises:
        RequestError: a file cannot be read or decompressed.
    """
    for name in names:
        try:
            yield from _read_file(name)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise RequestError(f"--input {name}: cannot decompress it: {error}") from None
        except OSError as error:
            raise RequestError(f"--input {name}: cannot read it: {error.strerror or error}") from None


def _read_file(name: str) -> Iterator[Chunk]:
    if name == STDIN:
        yield from _read_lines(name, sys.stdin.buffer, None)
        return
    with open(name, "rb") as raw:
        stream = _decompressed(name, raw)
        if is_json_lines(name):
            yield from _read_lines(name, stream, raw)
        else:
            yield Chunk(name, 1, False, [stream.read()], raw.tell())


def _read_lines(name: str, stream: BinaryIO, raw: BinaryIO | None) -> Iterator[Chunk]:
    """`raw` is the file beneath `stream`, whose position says how far we are; None for a pipe, which has none."""
    lines: list[bytes] = []
    first, size, before = 1, 0, 0
    for number, line in enumerate(stream, start=1):
        lines.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            position = raw.tell() if raw else before + size
            yield Chunk(name, first, True, lines, position - before)
            lines, first, size, before = [], number + 1, 0, position
    position = raw.tell() if raw else before + size
    yield Chunk(name, first, True, lines, position - before)


def _decompressed(name: str, raw: BinaryIO) -> BinaryIO:
    if name.endswith(".gz"):
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstandardReader(raw), _BLOCK_BYTES)
    return raw


class _ZstandardReader(io.RawIOBase):
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
            data = data or self._raw.read(_BLOCK_BYTES)
            if not data:
                if self._started:
                    raise EOFError("the file ends before its last frame does")
                return 0
            self._started = True
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
