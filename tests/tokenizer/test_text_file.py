"""Which files are text, by content and name: JSON lines, plain text, or a refusal; and what is left out of them."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import sentencepiece
import zstandard

from tokenizer.__main__ import main
from tokenizer.errors import TokenizerError
from tokenizer.text.documents import Tally, read_documents, read_lines
from tokenizer.text.file import inspect

TEXTS = ["第一篇文章，有 English words。", "the second\none", "x" * 70_000]
LINES = "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
LONG_FIRST = b"".join(reversed(LINES.splitlines(keepends=True)))
PROSE = "人工智能是一门学科。\nThe quick brown fox.\n".encode()
PRETTY = json.dumps([{"text": "a"}], indent=1).encode()
TEMPLATE = b'{"a": 1}\nis an object of JSON.\nThis is a text about it.\nIt ends here.\n'


def read(path: Path, tally: Tally | None = None) -> list[str]:
    told: list[int] = []
    documents = list(read_documents([path], "text", told.append, tally=tally))
    assert sum(told) == path.stat().st_size
    return documents


@pytest.mark.parametrize("content", [LINES, LONG_FIRST, b"\xef\xbb\xbf" + LINES, b"\n" + LINES.replace(b"\n", b"\r\n")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonl.1", "part-00000", "a.txt", "a"])
def test_json_lines_under_any_name(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert sorted(read(tmp_path / name)) == sorted(TEXTS)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "part-0.zst", "a.BZ2", "a.xz"])
def test_content_says_how_a_file_is_compressed(tmp_path: Path, compress: object, name: str) -> None:
    (tmp_path / name).write_bytes(compress(LINES))  # type: ignore[operator]
    assert read(tmp_path / name) == TEXTS
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-6])
    with pytest.raises(TokenizerError, match=r"--input .*: cannot decompress it"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", PROSE),
        ("a.md", b"\xef\xbb\xbf" + PROSE),
        ("part-0", b"{ this is no JSON }\n"),
        ("a.txt", b"[1] a footnote\n"),
        ("a.md", b'["quoted"](link)\n'),
        ("a.txt", TEMPLATE),
        ("a.tex", b'{"quoted} in braces\n'),
        ("a.txt", "\u2028 and \x0b are no line ends\n".encode()),
    ],
)
def test_plain_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    lines = content.removeprefix(b"\xef\xbb\xbf").decode().split("\n")[:-1]
    assert [line.rstrip("\n") for line in read(tmp_path / name)] == lines
    assert not inspect("--input", tmp_path / name).json_lines


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("part-0", TEMPLATE, "its first line is an object of JSON, line 2"),
        ("a.txt", LINES + b"{\n", None),
        ("a.txt", LINES[: LINES.index(b"\n") + 1] * 3 + b'{"text": \n', "its first line is an object of JSON, line 4"),
        ("part-0", PRETTY, "an array of JSON: write one object a line"),
        ("a.txt", PRETTY, "an array of JSON"),
        ("a.json", PRETTY, ":1: not JSON: .* one object a line is read"),
        ("a.json", json.dumps([{"text": "a"}]).encode(), ":1: not a JSON object, but list: one object a line"),
        ("part-0", json.dumps({"text": "a", "b": 1}, indent=1).encode(), "JSON over several lines"),
        ("a.json", json.dumps({"text": "a", "b": 1}, indent=1).encode(), ":1: not JSON: .* one object a line"),
        ("a.jsonl", PROSE, ":1: not JSON"),
        ("a.jsonl", b"[" * 100_000, ":1: not JSON"),
        ("a.jsonl", b'{"text": "\\udc80"}', ":1: not valid UTF-8: surrogates"),
        ("a.jsonl", b'{"text": null}', "no text under the key 'text': it is NoneType"),
        ("a.jsonl", b'{"text": "a\x00"}', "NUL bytes"),
        ("a.txt", PROSE * 2000 + b"\x00", "a.txt:4001: a NUL byte"),
        ("a.txt", PROSE.decode().encode("gb18030"), "not valid UTF-8: it may be GB18030"),
        ("a.jsonl", LINES.decode().encode("gbk"), ":1: not valid UTF-8: it may be GB18030"),
        ("a.txt", "caf\xe9 au lait\n".encode("latin-1"), ":1: not valid UTF-8: invalid continuation byte"),
        ("a.txt", PROSE.decode().encode("utf-16"), "not valid UTF-8: it is UTF-16"),
        ("a.txt", PROSE.decode().encode("utf-32"), "not valid UTF-8: it is UTF-32"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "UTF-16 without its mark"),
        ("a.csv", b"id,text\n1,a\n", "a table"),
        ("a.TSV.gz", gzip.compress(b"id\ttext\n", mtime=0), "a table"),
        ("a.jsonl", b"PAR1\x15\x04", "a Parquet file"),
        ("a", b"ARROW1\0\0", "an Arrow file"),
        ("data.arrow", b"\xff\xff\xff\xff\x78\x01\0\0", "an Arrow file"),
        ("a.txt.gz", gzip.compress(b"PK\x03\x04" + b"x" * 99, mtime=0), "an archive"),
        ("a.jsonl", b"x" * 257 + b"ustar\x0000", "a tar archive"),
        ("a.jsonl.gz", LINES, "cannot decompress it: its content is not gzip's"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18abc", "lz4"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str | None) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message or "not JSON") as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"--input {tmp_path / name}")


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": "a\\n \\nb"}\n{"text": " "}\n', "utf-8")
    (tmp_path / "a.txt").write_text("c\n\n \nd\n", "utf-8")
    tally = Tally()
    lines = read_lines([tmp_path / "a.jsonl", tmp_path / "a.txt"], "text", lambda _: None, tally=tally)
    assert list(lines) == ["a", "b", "c", "d"]
    assert tally == Tally(documents=3, empty=2, blank=4)

    # SentencePiece leaves out a whole line that has this block
    (tmp_path / "b.txt").write_text("a progress bar ▅▅ of blocks\n" * 30 + "\n", "utf-8")
    command = ["train", "--input", tmp_path / "b.txt", "--vocab-size", 300, "--output", tmp_path / "b.model", "--quiet"]
    assert main([*map(str, command), "--no-hard-vocab-limit"]) == 0
    said = "read 30 documents; left out: 0 empty ones, 1 blank lines, 60 characters that SentencePiece reserves"
    assert said in capsys.readouterr().out
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "b.model"))
    assert "▁progress" in model.encode("a progress", out_type=str)
