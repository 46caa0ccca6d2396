"""tools.preprocess_data: what it writes, and what it refuses."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard

from tokenizer.formats.load import open_tokenizer
from tools.preprocess_data import main
from tools.preprocessing.encode import LostCharacters

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt did so twice.",
    "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。它研究什么？研究怎样让机器思考！",
    "mixed 中英文 text。 numbers 12345, tabs\tand  double  spaces  ",
    "第一段。\n\n第二段，还是同一篇文章。",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 5), model_writer=file, vocab_size=420, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def run(model: Path, prefix: Path, *inputs: object, flags: tuple[str, ...] = ()) -> int:
    return main(["--input", *map(str, inputs), "--tokenizer-model", str(model), "--output-prefix", str(prefix), *flags])


def read_back(prefix: Path) -> list[list[int]]:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = indexed.IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_megatron_reads_it_token_for_token(model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert run(model, tmp_path / "out", source, flags=("--append-eod", "--prepend-bos", "--workers", "1")) == 0
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    assert read_back(tmp_path / "out") == [[1, *encode(text), 2] for text in TEXTS]
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert sidecar["documents"] == len(TEXTS)
    assert sidecar["tokens"] == sum(len(encode(text)) + 2 for text in TEXTS)
    assert sidecar["append_eod"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.bin", "out.idx", "out.json"]


def test_same_bytes_as_megatrons_builder(model: Path, tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    assert run(model, tmp_path / "ours", write_jsonl(tmp_path / "a.jsonl", TEXTS)) == 0
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in TEXTS:
        builder.add_item(torch.tensor(encode(text)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_order_does_not_depend_on_the_workers(model: Path, tmp_path: Path) -> None:
    texts = [f"{text} {number} " * (1 + number % 40) for number in range(800) for text in TEXTS]  # several chunks
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for workers in ("1", "3"):
        assert run(model, tmp_path / workers, source, flags=("--workers", workers)) == 0
    assert source.stat().st_size > 3 * (256 << 10)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"3{suffix}").read_bytes()


def test_compressed_files_text_files_and_stdin(model: Path, tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    assert run(model, tmp_path / "plain", tmp_path / "a.jsonl") == 0
    expected = read_back(tmp_path / "plain")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:100]) + gzip.compress(lines[100:]))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.json.zst").write_bytes(compress(lines[:99]) + compress(lines[99:]))
    for number, name in enumerate(("b.jsonl.gz", "c.json.zst")):
        assert run(model, tmp_path / f"out{number}", tmp_path / name) == 0
        assert read_back(tmp_path / f"out{number}") == expected

    (tmp_path / "one.txt").write_text("﻿" + TEXTS[3], "utf-8")  # with the mark that Windows editors put first
    (tmp_path / "two.md.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    assert run(model, tmp_path / "text", tmp_path / "one.txt", tmp_path / "two.md.gz") == 0
    assert read_back(tmp_path / "text") == [expected[3], expected[0]]

    command = ["-m", "tools.preprocess_data", "--input", "-", "--tokenizer-model", model]
    command += ["--output-prefix", tmp_path / "stdin", "--workers", "2"]
    subprocess.run([sys.executable, *map(str, command)], input=lines, check=True, cwd=ROOT, capture_output=True)
    assert read_back(tmp_path / "stdin") == expected


def test_empty_documents_are_counted_and_keys_joined(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"t": "", "b": " "}\n\n{"t": "题目", "b": "正文"}\n', "utf-8")
    assert run(model, tmp_path / "out", source, flags=("--json-keys", "t", "b", "--workers", "1")) == 0
    assert "1 documents (1 empty skipped, 1 blank lines skipped)" in capsys.readouterr().out
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    assert read_back(tmp_path / "out") == [encode("题目\n正文")]


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "</s>": 1, "far": 70000} | {f"w{i}": i for i in range(2, 70000)}
    level = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(level)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "a.jsonl", ["far w5 </s> far"])
    assert run(tmp_path, tmp_path / "out", source, flags=("--append-eod", "--workers", "1")) == 0
    assert read_back(tmp_path / "out") == [[70000, 5, 0, 0, 0, 70000, 1]]  # "</s>" in the text is text
    assert json.loads((tmp_path / "out.json").read_text())["dtype"] == "int32"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', "a.jsonl:2: no text under the key 'text': it is missing"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: no text under the key 'text': it is int"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: not valid UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not valid UTF-8"),
        ("a.txt", b"\xff\xfe\xff", "a.txt: not valid UTF-8"),
        ("a.jsonl", b"", "no documents"),
        ("a.jsonl", b'{"text": ""}\n', "no documents with text (1 empty skipped)"),
        ("a.jsonl.gz", b"not gzip", "cannot decompress"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-12], "cannot decompress"),
        ("a.jsonl.zst", b"not zstandard", "cannot decompress"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"text": "x"}\n' * 99)[:-9], "cannot decompress"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_input_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str,
    workers: str,
) -> None:  # fmt: skip
    (tmp_path / name).write_bytes(content)
    assert run(model, tmp_path / "out", tmp_path / name, flags=("--workers", workers)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_requests(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    (tmp_path / "bad.json").write_bytes(b"{}")
    cases = [
        (model, tmp_path / "out", tmp_path / "missing.jsonl", (), "does not exist"),
        (model, tmp_path / "out", tmp_path, (), "is not a file"),
        (tmp_path / "bad.model", tmp_path / "out", source, (), "is not a SentencePiece model"),
        (tmp_path / "bad.json", tmp_path / "out", source, (), "is not a Hugging Face tokenizer.json"),
        (tmp_path / "none.model", tmp_path / "out", source, (), "cannot read it"),
        (tmp_path, tmp_path / "out", source, (), "no tokenizer.model or tokenizer.json"),
        (model, tmp_path / "none" / "out", source, (), "does not exist"),
        (model, tmp_path / "out", source, ("--workers", "0"), "--workers 0"),
        (model, tmp_path / "out", source, ("--worker", "2"), "unrecognized arguments"),
    ]
    before = sorted(tmp_path.iterdir())
    for tokenizer, prefix, path, flags, message in cases:
        assert run(tokenizer, prefix, path, flags=flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_the_input_is_never_written_over(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.json", TEXTS)  # the sidecar of prefix `a` has the same name
    assert run(model, tmp_path / "a", source, flags=("--overwrite",)) == 2
    assert "would write over --input" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_existing_output_needs_overwrite(model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    shorter = write_jsonl(tmp_path / "b.jsonl", TEXTS[:2])
    assert run(model, tmp_path / "out", source) == 0
    before = (tmp_path / "out.bin").read_bytes()
    assert run(model, tmp_path / "out", shorter) == 2
    assert (tmp_path / "out.bin").read_bytes() == before
    assert run(model, tmp_path / "out", shorter, flags=("--overwrite",)) == 0
    assert len(read_back(tmp_path / "out")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = ["-m", "tools.preprocess_data", "--input", "-", "--tokenizer-model", model]
    command += ["--output-prefix", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    assert process.stdin
    assert process.stderr
    process.stdin.write(b'{"text": "x"}\n' * 60000)
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, number)
    assert process.wait(20) == 130
    assert b"Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []
    process.stdin.close()
    process.stderr.close()


def test_characters_that_a_tokenizer_does_not_keep(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["an apple a day", "人工智能"] * 9), model_prefix=str(tmp_path / "t"), vocab_size=40,
        hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    lost = LostCharacters(open_tokenizer("--tokenizer", tmp_path / "t.model"))
    assert lost.count("an apple  a\nday 人工智能") == (0, 0)  # spaces and line breaks become spaces
    unknown, removed = lost.count("猫an\x01 ap\u0007ple猫")
    assert (unknown, removed) == (2, 2)
