"""Finding, reading and opening a tokenizer, against sentencepiece and tokenizers themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from tests.tokenizer.samples import (
    CHINESE,
    ENGLISH,
    as_tokenizer_json,
    write_byte_level,
    write_json,
    write_sentencepiece,
)
from tokenizer.errors import TokenizerError
from tokenizer.formats.load import open_tokenizer, read_tokenizer
from tokenizer.formats.record import read_record, record_of
from tokenizer.formats.sentencepiece_model import read_model

TEXTS = [*ENGLISH, *CHINESE, "  two  spaces ", "</s> in <s> text <|endoftext|>", "🦙é\t", "<0x0A>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("load") / "tokenizer.model", [*ENGLISH, *CHINESE] * 3, 500)


def refused(function, *arguments: object) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(TokenizerError) as error:
        function("--flag", *arguments)
    message = str(error.value)
    assert message.startswith("--flag ")
    assert "\n" not in message
    return message


def test_a_sentencepiece_model(model: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for name in (model, model.parent, str(model.parent)):
        ours = open_tokenizer("--flag", name)
        assert ours.path == model
        assert (ours.vocab_size, ours.unk_id, ours.bos_id, ours.eos_id) == (theirs.vocab_size(), 0, 1, 2)
        assert ours.pad_id is None
        assert ours.byte_ids == set(range(3, 259))
        assert ours.pieces == {index: theirs.id_to_piece(index) for index in range(theirs.vocab_size())}
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text)
            assert ours.decode(ours.encode(text)) == text


def test_a_tokenizer_json(model: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    parsed = as_tokenizer_json(model)
    parsed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path = write_json(tmp_path / "tokenizer.json", parsed)
    slow, fast = open_tokenizer("--flag", model), open_tokenizer("--flag", tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.no_truncation()
    assert (fast.vocab_size, fast.unk_id, fast.bos_id, fast.eos_id) == (theirs.get_vocab_size(), 0, 1, 2)
    assert fast.pieces == slow.pieces
    assert fast.byte_ids == slow.byte_ids
    for text in TEXTS:  # whole, whatever the file says of truncation, and "</s>" is text
        assert fast.encode(text) == slow.encode(text)
        assert fast.decode(fast.encode(text)) == text
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<s>"}, "pad_token": "</s>"})
    configured = read_tokenizer("--flag", path)
    assert (configured.bos_id, configured.eos_id, configured.pad_id) == (None, 1, 2)


def test_byte_level(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = write_byte_level(tmp_path / "tokenizer.json", [*ENGLISH, *CHINESE] * 3, 500)
    ours, theirs = open_tokenizer("--flag", path), tokenizers.Tokenizer.from_file(str(path))
    assert ours.kind == "byte-level BPE"
    for index in range(1, theirs.get_vocab_size()):
        assert (index in ours.byte_ids) == ("�" in theirs.decode([index])), theirs.id_to_token(index)
    assert 0 not in ours.byte_ids  # <|endoftext|>
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text


def test_vocabularies_of_other_forms(tmp_path: Path) -> None:
    unigram = {"model": {"type": "Unigram", "unk_id": 1, "vocab": [["<s>", 0.0], ["<unk>", 0.0], ["a", -3.5]]}}
    found = read_tokenizer("--flag", write_json(tmp_path / "unigram.json", unigram))
    assert (found.vocab_size, found.bos_id, found.unk_id, found.eos_id) == (3, 0, 1, None)
    gaps = {"model": {"vocab": {"a": 0, "b": 9}}, "added_tokens": [{"content": "</s>", "id": 11}]}
    found = read_tokenizer("--flag", write_json(tmp_path / "gaps.json", gaps))
    assert (found.vocab_size, found.eos_id, found.pieces) == (12, 11, {0: "a", 9: "b", 11: "</s>"})


def test_the_same_by_content(model: Path, tmp_path: Path) -> None:
    """A file written anew and another form are the same tokenizer; scores, merges and what goes before count."""
    first = record_of(read_tokenizer("--flag", model))
    assert read_record(first.plain()) == first
    again, other = read_model("--flag", model), read_model("--flag", model)
    again.trainer_spec.input.append("elsewhere.txt")
    other.normalizer_spec.add_dummy_prefix = not other.normalizer_spec.add_dummy_prefix
    (tmp_path / "again.model").write_bytes(again.SerializeToString())
    (tmp_path / "other.model").write_bytes(other.SerializeToString())
    parsed = as_tokenizer_json(model)
    write_json(tmp_path / "form.json", parsed)
    joined = [" ".join(pair) for pair in parsed["model"]["merges"]]  # as older versions wrote them
    short = {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}}
    write_json(tmp_path / "joined.json", parsed | short | {"model": parsed["model"] | {"merges": joined}})
    write_json(tmp_path / "merges.json", parsed | {"model": parsed["model"] | {"merges": joined[::-1]}})
    records = {path.stem: record_of(read_tokenizer("--flag", path)) for path in tmp_path.iterdir()}
    assert [first.difference(records[name]) for name in ("again", "form", "joined")] == [None] * 3
    assert records["form"].difference(records["joined"]) is None
    for one, another in ((first, records["other"]), (records["form"], records["merges"])):
        assert "cuts text by other rules" in str(one.difference(another))
    ready = [record_of(open_tokenizer("--flag", tmp_path / f"{name}.json")) for name in ("form", "joined", "merges")]
    sampled = record_of(open_tokenizer("--flag", model))
    assert [sampled.difference(other) for other in ready[:2]] == [None, None]
    assert "cuts the same text into others" in str(sampled.difference(ready[2]))  # across forms
    for damaged in (None, [], {}, first.plain() | {"eos_token_id": "2"}, first.plain() | {"sha256": None}):
        with pytest.raises(ValueError):
            read_record(damaged)


def test_names_in_either_file_of_hugging_face(tmp_path: Path) -> None:
    vocabulary = {"model": {"vocab": {"<s>": 0, "</s>": 1, "<a>": 2, "<b>": 3}}}
    path = write_json(tmp_path / "tokenizer.json", vocabulary)
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<a>", "eos_token": {"content": "<b>"}})
    assert (read_tokenizer("--flag", path).bos_id, read_tokenizer("--flag", path).eos_id) == (2, 3)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    assert (read_tokenizer("--flag", path).bos_id, read_tokenizer("--flag", path).eos_id) == (2, 1)


def test_reading_needs_no_other_package(model: Path, tmp_path: Path) -> None:
    path = write_json(tmp_path / "tokenizer.json", as_tokenizer_json(model))
    code = (
        "import sys; sys.modules.update(tokenizers=None, sentencepiece=None, torch=None, transformers=None)\n"
        "from tokenizer.formats.load import read_tokenizer, open_tokenizer\n"
        f"print(read_tokenizer('--flag', {str(path)!r}).vocab_size)\n"
        f"open_tokenizer('--flag', {str(path)!r})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert int(result.stdout) == len(read_model("--flag", model).pieces)
    assert "TokenizerError: --flag" in result.stderr
    assert "needs `pip install tokenizers`" in result.stderr


def test_what_is_no_tokenizer(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    for function in (read_tokenizer, open_tokenizer):
        assert "no tokenizer.model or tokenizer.json in this directory" in refused(function, tmp_path)
        assert "cannot read it: No such file" in refused(function, tmp_path / "none.model")
        for name, content in (
            ("bad.model", b"not a model"),
            ("empty.model", b""),
            ("cut.model", model.read_bytes()[:999]),
        ):
            (tmp_path / name).write_bytes(content)
            assert f"{name} is not a SentencePiece model" in refused(function, tmp_path / name)
        for value in ({}, [], {"model": []}, {"model": {"vocab": {}}}, {"model": {"vocab": {"a": "b"}}}):
            bad = write_json(tmp_path / "bad.json", value)
            assert "is not a Hugging Face tokenizer.json" in refused(function, bad)
        (tmp_path / "tokenizer.json").write_text(json.dumps(as_tokenizer_json(model)))
        (tmp_path / "tokenizer_config.json").write_text("[]")
        assert "tokenizer_config.json is not a JSON object" in refused(function, tmp_path)
        (tmp_path / "tokenizer.json").unlink()


def test_a_piece_twice(model: Path, tmp_path: Path) -> None:
    proto = read_model("--flag", model)
    proto.pieces.add(piece=proto.pieces[300].piece)
    (tmp_path / "twice.model").write_bytes(proto.SerializeToString())
    assert "has a piece twice" in refused(open_tokenizer, tmp_path / "twice.model")


def test_what_cannot_be_merged_says_why(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    assert read_model("--flag", model.parent).pieces  # a directory with a tokenizer.model will do
    gpt2 = write_byte_level(tmp_path / "tokenizer.json", ENGLISH * 3, 300)
    for name in (gpt2, tmp_path):
        message = refused(read_model, name)
        assert "byte-level BPE, as GPT-2's" in message
        assert "give a SentencePiece model" in message
    message = refused(read_model, write_json(tmp_path / "llama.json", as_tokenizer_json(model)))
    assert "give the tokenizer.model that it was made from" in message
    assert "neither" in refused(read_model, write_json(tmp_path / "other.json", {"a": 1}))
    (tmp_path / "disguised.model").write_bytes(gpt2.read_bytes())
    assert "byte-level BPE" in refused(read_model, tmp_path / "disguised.model")
    proto = read_model("--flag", model)
    proto.ClearField("trainer_spec")
    proto.ClearField("normalizer_spec")
    (tmp_path / "cut.model").write_bytes(proto.SerializeToString())  # cut between two fields
    assert "the end of this SentencePiece model is missing" in refused(read_model, tmp_path / "cut.model")
