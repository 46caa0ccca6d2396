"""python -m tokenizer audit: every fault is found where there is one, and none where there is none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.tokenizer.samples import (
    CHINESE,
    ENGLISH,
    as_tokenizer_json,
    write_byte_level,
    write_json,
    write_jsonl,
    write_sentencepiece,
)
from tokenizer.__main__ import main
from tokenizer.audit.report import Finding
from tokenizer.audit.run import audit
from tokenizer.formats.sentencepiece_model import read_model

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base.model, extended.model (base and faults) and text.jsonl."""
    directory = tmp_path_factory.mktemp("audit")
    base = read_model("", write_sentencepiece(directory / "base.model", [*ENGLISH, *CHINESE] * 3, 460))
    base.pieces.add(piece="ep", score=0.0)  # merged before ee and ps, of which eeps is made
    base.pieces.add(piece="智力测", score=0.0)  # there is no 智力 and no 力测
    (directory / "extended.model").write_bytes(base.SerializeToString())
    write_jsonl(directory / "text.jsonl", [*ENGLISH, *CHINESE, "an other line\nthe dog keeps on"])
    return directory


def findings(path: Path, base: Path | None = None, *inputs: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in audit(path, base, inputs, "text", quiet=True).findings}


def statuses(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.status for name, finding in found.items()}


def test_a_sound_tokenizer(made: Path) -> None:
    base = made / "base.model"
    assert statuses(findings(base, base, made / "text.jsonl")) == {
        "duplicates": "ok", "dead pieces": "ok", "lost base pieces": "ok", "any character": "ok",
        "special tokens": "ok", "byte fallback": "ok", "unknown": "ok", "round trip": "ok", "changed lines": "ok",
        "slow and fast": "skipped",
    }  # fmt: skip
    alone = statuses(findings(base))
    assert {name for name, status in alone.items() if status == "skipped"} == {
        "lost base pieces", "byte fallback", "unknown", "round trip", "changed lines", "slow and fast",
    }  # fmt: skip
    assert set(alone.values()) == {"ok", "skipped"}


def test_dead_lost_and_changed(made: Path) -> None:
    base, extended = made / "base.model", made / "extended.model"
    found = findings(extended, base, made / "text.jsonl")
    old, new = (sentencepiece.SentencePieceProcessor(model_file=str(path)) for path in (base, extended))
    size = old.vocab_size()
    # What sentencepiece itself does in the middle of a text: after a line end, which is one byte.
    alone = {index: new.encode("\n" + new.id_to_piece(index).replace("▁", " ")) for index in range(259, size + 2)}
    dead = [index for index, ids in alone.items() if ids[-1] != index or len(ids) != len(new.encode("\n")) + 1]
    assert size + 1 in dead
    assert size not in dead
    assert [new.id_to_piece(index) for index in dead[:-1]] == ["eeps"]
    assert found["dead pieces"].figures == {"ids": dead, "new_ids": [size + 1]}
    assert found["dead pieces"].examples == [f"{size + 1} '智力测'"]
    lost = found["lost base pieces"].figures["ids"]
    assert lost == {"absent": [], "moved": [], "not produced": dead[:-1]}
    lines = [line for text in (*ENGLISH, "an other line", "the dog keeps on") for line in text.split("\n")]
    changed = [line for line in lines if old.encode(line) != new.encode(line)]
    assert changed
    assert found["changed lines"].figures == {"lines": len(lines), "objections": len(changed)}
    assert all("  ->  " in example for example in found["changed lines"].examples)
    assert found["round trip"].status == "ok"


def test_absent_and_moved(made: Path, tmp_path: Path) -> None:
    proto = read_model("", made / "base.model")
    gone, first, second = 300, 310, 311
    names = [proto.pieces[index].piece for index in (gone, first, second)]
    proto.pieces[gone].piece = "ǆǆǆ"
    proto.pieces[first].piece, proto.pieces[second].piece = names[2], names[1]
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    found = findings(tmp_path / "other.model", made / "base.model")["lost base pieces"]
    assert found.status == "warning"
    assert found.figures["ids"]["absent"] == [gone]
    assert found.figures["ids"]["moved"] == [first, second]
    assert f"{first} {names[1]!r} -> {second} moved" in found.examples


def test_a_piece_twice(made: Path, tmp_path: Path) -> None:
    proto = read_model("", made / "base.model")
    proto.pieces.add(piece=proto.pieces[300].piece)
    (tmp_path / "twice.model").write_bytes(proto.SerializeToString())
    found = findings(tmp_path / "twice.model")
    assert statuses(found) == {"duplicates": "warning", "all other checks": "skipped"}
    assert found["duplicates"].examples == [f"{proto.pieces[300].piece!r} has the ids [300, {len(proto.pieces) - 1}]"]
    parsed = as_tokenizer_json(made / "base.model")
    parsed["added_tokens"].append({**parsed["added_tokens"][0], "content": "<new>", "id": 5})
    write_json(tmp_path / "tokenizer.json", parsed)
    pytest.importorskip("tokenizers")
    assert findings(tmp_path)["duplicates"].examples == ["id 5 is ['<0x02>', '<new>']"]


def test_normalization_and_no_byte_fallback(made: Path, tmp_path: Path) -> None:
    path = write_sentencepiece(
        tmp_path / "nfkc.model", [*ENGLISH, *CHINESE] * 3, 200, byte_fallback=False, model_type="unigram",
        normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True,
    )  # fmt: skip
    text = write_jsonl(tmp_path / "t.jsonl", ["人工智能，", "two  spaces", "龘"])
    found = findings(path, None, text)
    assert found["any character"].status == "warning"
    assert found["unknown"].figures["found"] == 1
    assert found["unknown"].examples == ["1 of 2 in '龘'"]
    assert found["round trip"].figures == {"lines": 3, "objections": 3}
    assert found["round trip"].examples[0] == "'人工智能，' -> '人工智能,'"


def test_byte_rate(made: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "t.jsonl", ["龘龘龘"])
    found = findings(made / "base.model", None, text)["byte fallback"]
    assert found.status == "warning"
    assert found.figures == {"tokens": 10, "found": 9}


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"special_tokens_map.json": {"bos_token": "</s>"}}, "bos_token '</s>' is id 2, elsewhere bos is id 1"),
    ({"special_tokens_map.json": {"pad_token": {"content": "<pad>"}}}, "pad_token '<pad>' has no id"),
    ({"tokenizer_config.json": {"pad_token": "</s>"}}, "pad and eos are both id 2"),
    ({"tokenizer_config.json": {"pad_token": "▁the"}}, "the plain text '▁the' is encoded to the pad id"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "[PAD]"}}}}, "id 7, which is '<0x04>' in"),
    ({"added_tokens.json": {"</s>": 900}}, "the added token '</s>' has id 900, the vocabulary has it at 2"),
    ({"config.json": {"vocab_size": 100}}, "vocab_size is 100, the tokenizer's ids go up to"),
    ({"added_tokens.json": {"[PAD]": 900}, "config.json": {"vocab_size": 900}}, "ids go up to 900"),
    ({"generation_config.json": {"eos_token_id": [0, 1]}}, "eos_token_id is [0, 1], the tokenizer's eos is 2"),
]


@pytest.mark.parametrize("files, problem", CONFLICTS, ids=[problem for _, problem in CONFLICTS])
def test_special_tokens_in_conflict(made: Path, tmp_path: Path, files: dict[str, Any], problem: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((made / "base.model").read_bytes())
    sound = {
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>",
                                  "pad_token": None, "added_tokens_decoder": {"1": {"content": "<s>"}}},
        "special_tokens_map.json": {"bos_token": "<s>"},
        "config.json": {"vocab_size": 5000, "eos_token_id": [2, 7], "pad_token_id": -1},
    }  # fmt: skip
    for name, content in sound.items():
        write_json(tmp_path / name, content)
    assert findings(tmp_path)["special tokens"].status == "ok"
    for name, content in files.items():
        write_json(tmp_path / name, sound.get(name, {}) | content)
    found = findings(tmp_path)["special tokens"]
    assert found.status == "warning"
    assert len(found.examples) == 1
    assert problem in found.examples[0]


def test_slow_and_fast(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.model").write_bytes((made / "base.model").read_bytes())
    parsed = as_tokenizer_json(made / "base.model")
    write_json(tmp_path / "tokenizer.json", parsed)
    found = findings(tmp_path, None, made / "text.jsonl")["slow and fast"]
    pieces = len(read_model("", made / "base.model").pieces)
    assert found.figures == {"lines": pieces + len(ENGLISH) + len(CHINESE) + 2, "objections": 0}
    assert found.status == "ok"
    parsed["model"]["merges"].reverse()
    write_json(tmp_path / "tokenizer.json", parsed)
    found = findings(tmp_path, None, made / "text.jsonl")["slow and fast"]
    assert found.status == "warning"
    assert found.figures["objections"] > 10
    assert findings(tmp_path)["slow and fast"].status == "warning"  # the pieces alone show it


def test_a_byte_level_tokenizer_is_audited_as_far_as_possible(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = write_byte_level(tmp_path / "tokenizer.json", [*ENGLISH, *CHINESE] * 3, 500)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    found = findings(path, path, made / "text.jsonl")
    assert statuses(found) == {
        "duplicates": "ok", "dead pieces": "skipped", "lost base pieces": "ok", "any character": "ok",
        "special tokens": "ok", "byte fallback": "ok", "unknown": "ok", "round trip": "ok", "changed lines": "ok",
        "slow and fast": "skipped",
    }  # fmt: skip
    assert "byte-level BPE" in found["dead pieces"].summary
    assert "not checked" in found["lost base pieces"].summary
    other = findings(path, made / "base.model", made / "text.jsonl")
    assert other["lost base pieces"].status == "warning"
    assert other["changed lines"].status == "warning"


def test_reports(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["audit", "--tokenizer", made / "extended.model", "--base", made / "base.model", "--quiet"]
    outputs = ["--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md"]
    assert main([*map(str, command), *map(str, outputs)]) == 0
    shown = capsys.readouterr().out
    assert "warning  dead pieces" in shown
    assert "智力测" in shown
    report = json.loads((tmp_path / "a.json").read_bytes())
    assert report["kind"] == "SentencePiece bpe"
    assert [finding["check"] for finding in report["findings"]][:2] == ["duplicates", "dead pieces"]
    assert report["findings"][1]["figures"]["new_ids"] == [report["vocab_size"] - 1]
    assert "| dead pieces | warning |" in (tmp_path / "a.md").read_text("utf-8")
    assert main([*map(str, command), "--strict"]) == 1
    assert main(["audit", "--tokenizer", str(made / "base.model"), "--strict", "--quiet"]) == 0
    capsys.readouterr()
    assert main([*map(str, command), *map(str, outputs)]) == 2
    assert "exists; choose another place, or add --overwrite" in capsys.readouterr().err
    assert main([*map(str, command), *map(str, outputs), "--overwrite"]) == 0


def test_bad_requests(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "pair.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / "bad.model").write_bytes(b"nothing")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "tokenizer.model").write_bytes((made / "base.model").read_bytes())
    (tmp_path / "dir" / "special_tokens_map.json").write_text("[")
    cases: list[tuple[list[object], str]] = [
        (["--tokenizer", tmp_path / "none.model"], "--tokenizer"),
        (["--tokenizer", tmp_path / "bad.model"], "bad.model is not a SentencePiece model"),
        (["--tokenizer", tmp_path], "no tokenizer.model or tokenizer.json in this directory"),
        (["--tokenizer", tmp_path / "dir"], "special_tokens_map.json is not a JSON object"),
        (["--base", tmp_path / "bad.model"], "--base"),
        (["--input", tmp_path / "none.txt"], "none.txt is not a file"),
        (["--input", tmp_path / "empty.txt"], "--input holds no text"),
        (["--input", tmp_path / "pair.jsonl"], "pair.jsonl:1: not valid UTF-8"),
        (["--input", made / "text.jsonl", "--json-key", "body"], "text.jsonl:1: no text under the key 'body'"),
        (["--json", tmp_path / "none" / "a.json"], "none does not exist"),
        (["--json", tmp_path / "a", "--markdown", tmp_path / "a"], "is the file of --json too"),
        (["--input", tmp_path / "empty.txt", "--json", tmp_path / "empty.txt", "--overwrite"], "write over --input"),
        (["--strictly"], "unrecognized arguments"),
        (["--overwrite"], "--overwrite has no effect without --json, --markdown"),
        (["--json-key", "body"], "--json-key has no effect without --input"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for flags, message in cases:
        assert main(["audit", "--quiet", "--tokenizer", str(made / "base.model"), *map(str, flags)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reader_that_stops_early(made: Path) -> None:
    command = [sys.executable, "-m", "tokenizer", "audit", "--tokenizer", str(made / "base.model"), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0  # the audit's own code


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published models are not at hand")
def test_the_published_merge(tmp_path: Path) -> None:
    models = SHARED / "tokenizers"
    command = ["merge", "--base", models / "llama.model", "--extra", models / "chinese_sp.model", "--output", tmp_path]
    assert main([*map(str, command), "--mode", "chinese-llama"]) == 0
    found = findings(tmp_path, models / "llama.model", SHARED / "corpus" / "en_shakespeare.jsonl")
    assert len(found["dead pieces"].figures["new_ids"]) == 345
    lost = found["lost base pieces"].figures["ids"]
    assert [len(ids) for ids in lost.values()] == [0, 0, 194]
    proto = read_model("", tmp_path)
    dead = {proto.pieces[index].piece for index in found["dead pieces"].figures["new_ids"]}
    assert {"意大利", "加拿大", "博物馆", "国务院"} <= dead
    assert {"▁create", "Controller"} <= {proto.pieces[index].piece for index in lost["not produced"]}
    assert found["changed lines"].figures["objections"] > 0
    unhurt = ("duplicates", "any character", "special tokens", "unknown", "round trip")
    assert {found[name].status for name in unhurt} == {"ok"}
    base = findings(models / "llama.model")
    assert "warning" not in statuses(base).values()
