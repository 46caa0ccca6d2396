"""Files of text: what they are by their content and their name together, and their bytes without compression.

One reader for every program: lines of JSON or plain text in UTF-8. What is something else is refused by name.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from tokenizer.errors import TokenizerError
from tokenizer.text.characters import has_cjk

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


_HEAD = 64 << 10
_BLOCK = 1 << 20
_BOM = codecs.BOM_UTF8

# compression -> the suffixes of its files, its first bytes, its reader
_COMPRESSIONS: dict[str, tuple[tuple[str, ...], re.Pattern[bytes], Callable[[BinaryIO], Any]]] = {
    "gzip": ((".gz", ".gzip"), re.compile(rb"\x1f\x8b"), lambda raw: gzip.GzipFile(fileobj=raw)),
    "Zstandard": (
        (".zst", ".zstd"),
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda raw: io.BufferedReader(ZstandardReader(raw), _BLOCK),
    ),
    "bzip2": ((".bz2",), re.compile(rb"BZh[1-9]1AY&SY"), bz2.BZ2File),
    "xz": ((".xz",), re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
}
_JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
_PLAIN = (".txt", ".text", ".md", ".rst")
_TABLES = (".csv", ".tsv")
_AS_LINES = "write its texts as JSON lines"
_FOREIGN = (
    (re.compile(rb"PAR1"), f"a Parquet file: {_AS_LINES}"),
    (re.compile(rb"ARROW1|FEA1|\xff{4}[\x00-\xff]{3}\x00"), f"an Arrow file: {_AS_LINES}"),
    (re.compile(rb"Obj\x01"), f"an Avro file: {_AS_LINES}"),
    (re.compile(rb"\x93NUMPY|\x89HDF|SQLite format 3\x00|MMIDIDX"), "a file of a program, no text"),
    (re.compile(rb"%PDF-|\x89PNG|\xff\xd8\xff"), "a document or a picture: take its text out first"),
    (re.compile(rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!|\x1f\x9d"), "an archive or an Office document: unpack it"),
    (re.compile(rb"\x04\x22\x4d\x18|\xff\x06\x00\x00sNaPpY"), "compressed with lz4 or snappy: use gzip or Zstandard"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive: unpack it"),
    (re.compile(rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff"), "not valid UTF-8: it is UTF-32 (iconv -f UTF-32 -t UTF-8)"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "not valid UTF-8: it is UTF-16 (iconv -f UTF-16 -t UTF-8)"),
    (re.compile(rb"[^\x00]*\x00"), "NUL bytes: UTF-16 without its mark (iconv -f UTF-16LE -t UTF-8), or no text"),
)  # fmt: skip
_OBJECT = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:')
_ARRAY = re.compile(rb'\[\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')


@dataclass(frozen=True)
class TextFile:
    """What a file was found to be. compression: a key of `_COMPRESSIONS`, or None. json_lines: else plain text."""

    path: Path
    compression: str | None
    json_lines: bool

    @contextlib.contextmanager
    def open(self, flag: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """The text's bytes, and the file beneath, whose position says how far we are.

        Raises:
            TokenizerError: it cannot be read or decompressed.
        """
        try:
            with self.path.open("rb") as raw:
                yield raw if self.compression is None else _COMPRESSIONS[self.compression][2](raw), raw
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise TokenizerError(f"{flag} {self.path}: cannot decompress it: {error}") from None
        except OSError as error:
            # bz2 tells of damage without a number
            what = "read" if error.errno else "decompress"
            raise TokenizerError(f"{flag} {self.path}: cannot {what} it: {error.strerror or error}") from None


def inspect(flag: str, path: Path) -> TextFile:
    """Find out what a file is, by its first 64 KiB and its name.

    Content decides on compression. JSON lines are what is named so, and any other file of which every line begins
    as an object of JSON and ends as one; where only its first line is one, a name of plain text is believed.

    Raises:
        TokenizerError: it is no file, or neither JSON lines nor plain text in UTF-8.
    """
    if not path.is_file():
        raise TokenizerError(
            f"{flag} {path} {'is not a file' if path.exists() else 'is not a file: it does not exist'}"
        )
    plain = TextFile(path, None, False)
    with plain.open(flag) as (stream, _):
        start = stream.read(512)
    compression = next((name for name, (_, magic, _) in _COMPRESSIONS.items() if magic.match(start)), None)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    named = next((name for name, (ends, _, _) in _COMPRESSIONS.items() if suffixes and suffixes[-1] in ends), None)
    if named is not None:
        suffixes.pop()
        if compression is None and start:
            raise TokenizerError(f"{flag} {path}: cannot decompress it: its content is not {named}'s")
    with TextFile(path, compression, False).open(flag) as (stream, _):
        head = stream.read(_HEAD)
    for pattern, what in _FOREIGN:
        if pattern.match(head):
            raise TokenizerError(f"{flag} {path}: {what}")
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _TABLES:
        raise TokenizerError(f"{flag} {path}: a table: {_AS_LINES}")
    json_lines = suffix in _JSON_LINES or _has_json_lines(f"{flag} {path}", head, suffix)
    return TextFile(path, compression, json_lines)


def _has_json_lines(where: str, head: bytes, suffix: str) -> bool:
    """Whether the beginning of a file that is not named as JSON is JSON lines."""
    body = head.removeprefix(_BOM).lstrip()
    if _ARRAY.match(body):
        raise TokenizerError(f"{where}: an array of JSON: write one object a line (jq -c '.[]')")
    if not _OBJECT.match(body):
        return False
    lines = [line for line in body.split(b"\n") if line.strip()]
    if len(head) == _HEAD and len(lines) > 1:
        lines.pop()  # it may go on
    elif len(head) == _HEAD:
        return True  # a first document that is longer than what was read
    objects = list(map(_is_object, lines))
    if all(objects):
        return True
    if not objects[0]:
        raise TokenizerError(f"{where}: JSON over several lines: write one object a line (jq -c .)")
    if suffix in _PLAIN and 2 * sum(objects) < len(objects):
        return False
    raise TokenizerError(
        f"{where}: its first line is an object of JSON, line {objects.index(False) + 1} of those that are not blank is "
        f"not: name it .jsonl when that is mended; plain text ends in {_PLAIN[0]}, and most of its lines are not JSON"
    )


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def decode(data: bytes, where: str, *, marked: bool = True) -> str:
    """Text from UTF-8, without the mark at its beginning (if it may be `marked`).

    Raises:
        TokenizerError: it is none; the message says what it may be.
    """
    if b"\x00" in data:
        raise TokenizerError(f"{where}: a NUL byte: no text in UTF-8")
    try:
        return data.decode("utf-8-sig" if marked else "utf-8")
    except UnicodeDecodeError as error:
        for encoding in ("gb18030", "big5"):
            with contextlib.suppress(UnicodeDecodeError):
                if has_cjk(codecs.getincrementaldecoder(encoding)().decode(data[error.start :][:_HEAD])):
                    raise TokenizerError(
                        f"{where}: not valid UTF-8: it may be {encoding.upper()} (iconv -f {encoding.upper()} -t UTF-8)"
                    ) from None
        raise TokenizerError(f"{where}: not valid UTF-8: {error.reason}") from None


def json_text(line: bytes, where: str, keys: tuple[str, ...], flag: str) -> str:
    """The text of a line of JSON: the values of `keys`, joined by line breaks. flag: that names others.

    Raises:
        TokenizerError: it is no object of JSON, or has no such text.
    """
    try:
        record = json.loads(decode(line, where))
    except RecursionError:
        raise TokenizerError(f"{where}: not JSON that can be read: too deep") from None
    except ValueError as error:
        if isinstance(error, TokenizerError):
            raise
        more = ": one object a line is read (jq -c .)" if line.strip() in (b"{", b"[") else ""
        raise TokenizerError(f"{where}: not JSON: {error}{more}") from None
    if not isinstance(record, dict):
        more = ": one object a line is read (jq -c '.[]')" if isinstance(record, list) else ""
        raise TokenizerError(f"{where}: not a JSON object, but {type(record).__name__}{more}")
    for key in keys:
        if not isinstance(record.get(key), str):
            what = f"it is {type(record[key]).__name__}" if key in record else "it is missing"
            raise TokenizerError(f"{where}: no text under the key {key!r}: {what}; name another with {flag}")
    text = "\n".join(record[key] for key in keys)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a character, which JSON lets through
        raise TokenizerError(f"{where}: not valid UTF-8: {error.reason}") from None
    return text
