"""Documents and lines of files of text, and how many of them hold none."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tokenizer.text.file import decode, inspect, json_text


@dataclass
class Tally:
    """What was read, and what was left out because there is no text in it.

    Attributes:
        documents: with text: objects of JSON, or lines of plain text.
        empty: documents of JSON without text.
        blank: lines of plain text, of JSON lines and within documents that are blank.
        reserved: characters that SentencePiece's trainer cannot take.
    """

    documents: int = 0
    empty: int = 0
    blank: int = 0
    reserved: int = 0

    def as_text(self) -> str:
        text = f"read {self.documents:,} documents; left out: {self.empty:,} empty ones, {self.blank:,} blank lines"
        return text + (f", {self.reserved:,} characters that SentencePiece reserves" if self.reserved else "")


def progress_bar(flag: str, paths: Sequence[Path], quiet: bool) -> tqdm:
    """Make a progress bar over the bytes of `paths`, to be told of each that was read.

    Raises:
        TokenizerError: one of them is not a file of text.
    """
    for path in paths:
        inspect(flag, path)
    total = sum(path.stat().st_size for path in paths)
    return tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=quiet, file=sys.stderr)


def read_lines(
    paths: Sequence[Path], key: str, advance: Callable[[int], object], flag: str = "--input", tally: Tally | None = None
) -> Iterator[str]:
    """Read the lines of `read_documents` that are not blank, without their line ends; arguments as there."""
    tally = tally or Tally()
    for document in read_documents(paths, key, advance, flag, tally):
        for line in io.StringIO(document, newline=None):
            if line.isspace():
                tally.blank += 1
            else:
                yield line.rstrip("\n")


def read_documents(
    paths: Sequence[Path], key: str, advance: Callable[[int], object], flag: str = "--input", tally: Tally | None = None
) -> Iterator[str]:
    """Read the documents with text of files of JSON lines, and the lines with text of any other file.

    Args:
        paths: files as `inspect` takes them.
        key: of the text in a JSON line.
        advance: told how many bytes of a file, as it lies on disk, were read since the last call.
        flag: that named the files.
        tally: counts.

    Raises:
        TokenizerError: a file cannot be read; the message says file:line.
    """
    tally = tally or Tally()
    for path in paths:
        file, before = inspect(flag, path), 0
        with file.open(flag) as (stream, raw):
            for number, line in enumerate(stream, start=1):
                position = raw.tell()
                advance(position - before)
                before = position
                where = f"{flag} {path}:{number}"
                if not line.strip():
                    tally.blank += 1
                    continue
                text = (
                    json_text(line, where, (key,), "--json-key")
                    if file.json_lines
                    else decode(line, where, marked=number == 1)
                )
                if not text.strip():
                    tally.empty += 1
                    continue
                tally.documents += 1
                yield text
