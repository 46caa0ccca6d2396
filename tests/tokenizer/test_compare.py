"""python -m tokenizer compare: its figures against a count by hand, and its table and picture."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.tokenizer.samples import CHINESE, ENGLISH, write_byte_level, write_jsonl, write_sentencepiece
from tokenizer.__main__ import main
from tokenizer.compare.run import LINES, RUNS, TOTAL, compare
from tokenizer.formats.load import open_tokenizer
from tokenizer.text.characters import chinese_runs, has_cjk

MIXED = "GPU上的矩阵乘法（matrix multiplication）很快：“快10倍”——真的！\n\nSee §3 — “fast”…"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with en.model, zh.model (without byte fallback), zh.jsonl, mixed.jsonl and en.txt."""
    directory = tmp_path_factory.mktemp("compare")
    write_sentencepiece(directory / "en.model", ENGLISH * 3, 400)
    write_sentencepiece(directory / "zh.model", CHINESE * 3, 200, byte_fallback=False, model_type="unigram")
    write_jsonl(directory / "zh.jsonl", CHINESE)
    write_jsonl(directory / "mixed.jsonl", [MIXED])
    (directory / "en.txt").write_bytes("\r\n".join(ENGLISH).encode())
    return directory


def records(made: Path, *names: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Part, input and tokenizer to record."""
    tokenizers = [open_tokenizer("--tokenizer", made / name) for name in names]
    inputs = [made / name for name in ("zh.jsonl", "mixed.jsonl", "en.txt")]
    found = compare(tokenizers, inputs, "text", quiet=True)
    return {(r["part"], Path(r["input"]).name, Path(r["tokenizer"]).name): r for r in found}


def test_runs_of_chinese() -> None:
    assert list(chinese_runs(MIXED)) == ["上的矩阵乘法（", "）很快：“快", "倍”——真的！"]
    assert list(chinese_runs("plain “quotes” — and… dots")) == []
    assert list(chinese_runs("〇𠀀，　Ａ")) == ["〇𠀀，　Ａ"]
    assert [has_cjk(text) for text in ("é…“", "、", "学", "かな", "한글")] == [False, True, True, False, False]


def test_figures_are_those_of_a_count_by_hand(made: Path) -> None:
    found = records(made, "en.model", "zh.model")
    assert len(found) == 2 * 4 * 2
    texts = {
        (LINES, "zh.jsonl"): CHINESE,
        (LINES, "mixed.jsonl"): [line for line in MIXED.split("\n") if line],
        (LINES, "en.txt"): ENGLISH,
        (RUNS, "mixed.jsonl"): list(chinese_runs(MIXED)),
        (RUNS, "en.txt"): [],
    }
    for name in ("en.model", "zh.model"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(made / name))
        for (part, source), parts in texts.items():
            record = found[part, source, name]
            ids = [index for text in parts for index in model.encode(text)]
            assert record["vocabulary"] == model.vocab_size()
            assert record["tokens"] == len(ids)
            assert record["characters"] == sum(map(len, parts))
            assert record["bytes"] == sum(len(text.encode()) for text in parts)
            assert record["byte_tokens"] == sum(map(model.is_byte, ids))
            assert record["unknown_tokens"] == ids.count(0)
            if parts:
                assert record["characters_per_token"] == sum(map(len, parts)) / len(ids)
                assert record["relative"] == len(ids) / found[part, source, "en.model"]["tokens"]
            else:
                assert record["characters_per_token"] is record["relative"] is record["byte_share"] is None
        for part in (LINES, RUNS):
            total = found[part, TOTAL, name]
            for key in ("tokens", "characters", "bytes", "byte_tokens", "unknown_tokens"):
                assert total[key] == sum(found[part, file, name][key] for file in ("zh.jsonl", "mixed.jsonl", "en.txt"))
    assert found[LINES, "zh.jsonl", "en.model"]["byte_share"] > 0.5
    assert found[LINES, "en.txt", "zh.model"]["unknown_share"] > 0.1


def test_byte_level_tokenizers_too(made: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    write_byte_level(made / "gpt2.json", ENGLISH * 3, 400)
    found = records(made, "en.model", "gpt2.json")
    theirs = tokenizers.Tokenizer.from_file(str(made / "gpt2.json"))
    record = found[LINES, "zh.jsonl", "gpt2.json"]
    ids = [index for text in CHINESE for index in theirs.encode(text).ids]
    assert record["tokens"] == record["byte_tokens"] == len(ids) == record["bytes"]  # it knows no Chinese character
    assert found[LINES, "en.txt", "gpt2.json"]["byte_share"] == 0


def test_reports_and_picture(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    command = ["compare", "--tokenizer", made / "en.model", "--tokenizer", made / "zh.model", "--quiet"]
    command += ["--input", made / "zh.jsonl", made / "en.txt"]
    outputs = ["--json", tmp_path / "c.json", "--markdown", tmp_path / "c.md", "--picture", tmp_path / "c.png"]
    assert main([*map(str, command), *map(str, outputs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == LINES
    written = json.loads((tmp_path / "c.json").read_bytes())
    assert len(written) == 2 * 3 * 2
    assert f"{written[1]['tokens']:,}" in lines[3].split()
    assert f"{written[1]['relative']:.1%}" == lines[3].split()[-1]
    assert len({len(line) for line in lines[1:8]}) == 1  # aligned
    assert (tmp_path / "c.md").read_text("utf-8").count("| zh.model |") == 6
    content = (tmp_path / "c.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG")
    assert min(width, height) >= 1000
    assert main([*map(str, command), "--picture", str(tmp_path / "c.svg")]) == 0
    drawing = (tmp_path / "c.svg").read_text("utf-8")
    assert drawing.rstrip().endswith("</svg>")
    for label in ("en.model", "zh.jsonl", "total", "none", "Characters per token in runs of Chinese"):
        assert re.search(f"<!-- {label}", drawing), label


def test_bad_requests(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.json").write_text("{}")
    model, text = ["--tokenizer", made / "en.model"], ["--input", made / "en.txt"]
    cases: list[tuple[list[object], str]] = [
        ([*model], "--input"),
        ([*text], "--tokenizer"),
        ([*text, "--tokenizer", tmp_path / "bad.json"], "bad.json is not a Hugging Face tokenizer.json"),
        ([*text, *model, *model], "en.model is given twice"),
        ([*model, *text, made / "en.txt"], "en.txt is given twice"),
        ([*model, "--input", tmp_path / "none"], "none is not a file"),
        ([*model, "--input", tmp_path / "empty.txt"], "--input holds no text"),
        ([*model, *text, "--picture", tmp_path / "c.pdf"], "must end in .png or .svg"),
        ([*model, *text, "--picture", tmp_path / "none" / "c.png"], "none does not exist"),
        ([*model, *text, "--picture", made / "en.txt"], "exists; choose another place, or add --overwrite"),
    ]
    before = sorted(tmp_path.iterdir())
    for flags, message in cases:
        assert main(["compare", "--quiet", *map(str, flags)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
    assert sorted(tmp_path.iterdir()) == before
