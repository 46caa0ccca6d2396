"""Documents of files, many at a time, for the processes that encode them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tokenizer.text.file import inspect

STDIN = "-"
CHUNK_BYTES = 256 << 10


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


def size_on_disk(names: Sequence[str]) -> int | None:
    """Count the bytes of all files, None when standard input is among them.

    Raises:
        TokenizerError: a file does not exist, or is neither JSON lines nor plain text.
    """
    files = [Path(name) for name in names if name != STDIN]
    for file in files:
        inspect("--input", file)
    return None if STDIN in names else sum(file.stat().st_size for file in files)


def read_chunks(names: Sequence[str]) -> Iterator[Chunk]:
    """Read the documents of the files, in order; standard input holds JSON lines.

    Raises:
        TokenizerError: a file cannot be read or decompressed.
    """
    for name in names:
        if name == STDIN:
            yield from _read_lines(name, sys.stdin.buffer, None)
            continue
        file = inspect("--input", Path(name))
        with file.open("--input") as (stream, raw):
            if file.json_lines:
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
