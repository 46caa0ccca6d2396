"""python -m tokenizer train, merge: the models, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece

from tests.tokenizer.samples import CHINESE, ENGLISH
from tokenizer.__main__ import main
from tokenizer.formats.sentencepiece_model import read_model
from tokenizer.output import write_files

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with en.model (BPE) and zh.model (unigram), and a merge of both in merged/."""
    directory = tmp_path_factory.mktemp("models")
    (directory / "en.txt").write_text("\n".join(ENGLISH * 3), "utf-8")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in CHINESE * 3]
    (directory / "zh.jsonl").write_text("\n".join(lines), "utf-8")
    for name, source, size, kind in (("en", "en.txt", 400, "bpe"), ("zh", "zh.jsonl", 340, "unigram")):
        command = ["train", "--input", directory / source, "--vocab-size", size, "--model-type", kind, "--quiet"]
        command += ["--output", directory / f"{name}.model", "--no-hard-vocab-limit"]
        assert main([*map(str, command)]) == 0
    assert merge(directory, directory / "merged") == 0
    return directory


def merge(models: Path, output: Path, *flags: str) -> int:
    command = ["merge", "--base", models / "en.model", "--extra", models / "zh.model", "--output", output]
    return main([*map(str, command), "--mode", "chinese-llama", "--quiet", *flags])


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_a_trained_model_has_llamas_conventions(models: Path) -> None:
    model = load(models / "en.model")
    assert [model.id_to_piece(index) for index in range(3)] == ["<unk>", "<s>", "</s>"]
    assert model.is_byte(3)
    assert model.is_byte(258)
    assert model.pad_id() == -1
    for text in [*ENGLISH, *CHINESE, "tabs\tand  double  spaces  ", "line\nbreak", "ﬁ Ａ ① é 🦙"]:
        assert model.decode(model.encode(text)) == text  # nothing normalized, nothing unknown
        assert 0 not in model.encode(text)
    pieces = [model.id_to_piece(index) for index in range(259, model.vocab_size())]
    assert all(len(piece.strip("▁")) == 1 for piece in pieces if any(letter.isdigit() for letter in piece))
    assert read_model("--base", models / "zh.model").trainer_spec.model_type == 1


def test_training_is_repeatable_and_cuts_long_lines(models: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("人工智能的训练" * 20000, "utf-8")  # beyond the trainer's limits in one line
    outputs = [tmp_path / name for name in ("a.model", "b.model")]
    for output in outputs:
        command = ["train", "--input", tmp_path / "long.txt", "--vocab-size", 275, "--output", output, "--quiet"]
        assert main([*map(str, command), "--no-hard-vocab-limit"]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert len(load(outputs[0]).encode("人工智能的训练")) < 7


def test_the_merge_follows_the_published_rule(models: Path) -> None:
    base, extra = (read_model("", models / f"{name}.model") for name in ("en", "zh"))
    merged = read_model("", models / "merged" / "tokenizer.model")
    count = len(base.pieces)
    assert list(merged.pieces[:count]) == list(base.pieces)
    known = {piece.piece for piece in base.pieces}
    new = merged.pieces[count:]
    assert [piece.piece for piece in new] == [piece.piece for piece in extra.pieces if piece.piece not in known]
    assert len(new) > 20
    assert all(piece.score == 0 and piece.type == piece.NORMAL for piece in new)
    assert merged.trainer_spec == base.trainer_spec
    model, before = load(models / "merged" / "tokenizer.model"), load(models / "en.model")
    assert all(model.encode(text) == before.encode(text) for text in ENGLISH)
    assert sum(len(model.encode(text)) for text in CHINESE) < 0.5 * sum(len(before.encode(text)) for text in CHINESE)


def test_transformers_gives_the_same_ids(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", minversion="5")
    directory = models / "merged"
    (directory / "config.json").write_text('{"model_type": "llama"}')  # as in an exported checkpoint
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    (directory / "config.json").unlink()
    model = load(directory / "tokenizer.model")
    assert len(tokenizer) == model.vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    for text in [*ENGLISH, *CHINESE, "tabs\tand  double  spaces  ", "line\n\nbreak", " 🦙 先 space", "学科学科科学"]:
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)
        assert tokenizer.encode(text) == [1, *model.encode(text)]
    assert tokenizer.decode(model.encode(CHINESE[0])) == CHINESE[0]


def test_a_pad_token_as_published(models: Path, tmp_path: Path) -> None:
    assert merge(models, tmp_path, "--add-pad-token") == 0
    proto, without = read_model("", tmp_path / "tokenizer.model"), read_model("", models / "merged")
    assert list(proto.pieces[:-1]) == list(without.pieces)
    assert (proto.pieces[-1].piece, proto.pieces[-1].score, proto.pieces[-1].type) == ("[PAD]", 0, 1)
    assert proto.trainer_spec == without.trainer_spec
    assert not (tmp_path / "tokenizer.json").exists()
    report = json.loads((tmp_path / "merge_report.json").read_text("utf-8"))
    assert report["added"]["padding"] == ["[PAD]"]
    assert report["no_tokenizer_json_because"]
    transformers = pytest.importorskip("transformers", minversion="5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.pad_token_id == len(proto.pieces) - 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published models are not at hand")
def test_the_published_model_with_padding_is_reproduced(tmp_path: Path) -> None:
    tokenizers = SHARED / "tokenizers"
    command = ["merge", "--base", tokenizers / "llama.model", "--extra", tokenizers / "chinese_sp.model"]
    flags = ["--output", tmp_path, "--mode", "chinese-llama", "--add-pad-token"]
    assert main([*map(str, [*command, *flags])]) == 0
    content = (tmp_path / "tokenizer.model").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"
    report = json.loads((tmp_path / "merge_report.json").read_text("utf-8"))
    assert report["pieces"] == 49954
    assert len(report["lost_base_pieces"]) == 194
    assert len(report["unreachable_new_pieces"]) == 346  # the 345 that are known, and [PAD]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published models are not at hand")
def test_the_published_model_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizers = SHARED / "tokenizers"
    command = ["merge", "--base", tokenizers / "llama.model", "--extra", tokenizers / "chinese_sp.model"]
    assert main([*map(str, command), "--output", str(tmp_path), "--mode", "chinese-llama"]) == 0
    content = (tmp_path / "tokenizer.model").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
    model = load(tmp_path / "tokenizer.model")
    assert model.vocab_size() == 49953
    transformers = pytest.importorskip("transformers", minversion="5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for corpus in ("zh_d2l", "zh_tang_poems", "en_shakespeare"):
        with (SHARED / "corpus" / f"{corpus}.jsonl").open(encoding="utf-8") as file:
            lines = [line for _, row in zip(range(10), file) for line in json.loads(row)["text"].splitlines()[:300]]
        wrong = [line for line in lines if tokenizer.encode(line, add_special_tokens=False) != model.encode(line)]
        assert not wrong


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_bad_training_requests(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.model"

    def train(source: object, size: object = 300, *flags: object, output: Path = output) -> str:
        common = ("--quiet", "--output", output)
        return refused(capsys, "train", "--input", source, "--vocab-size", size, *common, *flags)

    text = models / "en.txt"
    message = train(text, 5000)
    assert "the largest possible is " in message
    largest = message.split("the largest possible is ")[1].split()[0]
    ok = ["train", "--input", str(text), "--vocab-size", largest, "--quiet", "--output", str(tmp_path / "ok.model")]
    assert main(ok) == 0  # what the message says is true
    (tmp_path / "ok.model").unlink()
    assert "characters and bytes alone need: give " in train(text, 270)
    assert "no room for the special tokens" in train(text, 1)
    assert "is not a file" in train(tmp_path / "none.txt")
    assert "--character-coverage 2.0: give 0.98 to 1" in train(text, 300, "--character-coverage", 2)
    assert "must end in .model" in train(text, output=tmp_path / "x")
    assert "does not exist" in train(text, output=tmp_path / "no" / "x.model")
    assert "exists; choose another place" in train(text, output=models / "en.model")
    assert "invalid choice" in train(text, 300, "--model-type", "word")
    assert "unrecognized arguments" in train(text, 300, "--vocab", 3)
    for name, content, expected in (
        ("empty.txt", b"", "--input holds no text"),
        ("blank.txt", b"\n  \r\n", "--input holds no text"),
        ("blank.jsonl", b'{"text": ""}\n{"text": " "}\n', "--input holds no text"),
        ("bad.txt", b"fine\n\xff\n", "bad.txt:2: not valid UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{', "bad.jsonl:2: not JSON"),
        ("key.jsonl", b'{"body": "a"}\n', "key.jsonl:1: no text under the key 'text'"),
    ):
        (tmp_path / name).write_bytes(content)
        assert expected in train(tmp_path / name)
        (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == []


def test_bad_merge_requests(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a model")
    good, out = models / "en.model", tmp_path / "out"

    def both(base: Path, extra: Path, output: Path = out, *flags: str) -> str:
        return refused(capsys, "merge", "--base", base, "--extra", extra, "--output", output, *flags)

    assert "bad.model is not a SentencePiece model" in both(tmp_path / "bad.model", good)
    assert "--extra" in both(good, tmp_path / "none.model")
    unmakeable = tmp_path / "bad.model" / "out"
    assert "cannot make this directory" in both(good, models / "zh.model", unmakeable, "--mode", "chinese-llama")
    assert "exists; choose another place" in both(good, good, models / "merged")
    assert "invalid choice" in both(good, good, out, "--mode", "best")
    published = (good, models / "zh.model", out, "--mode", "chinese-llama")
    assert "--target-size has no meaning with --mode chinese-llama" in both(*published, "--target-size", "500")
    assert "--corpus has no meaning with --mode chinese-llama" in both(*published, "--corpus", str(good))
    assert "there is no --corpus" in both(*published, "--json-key", "body")
    assert "--extra adds nothing: the base has all of its" in both(good, good, out, "--mode", "chinese-llama")
    (tmp_path / "padded").mkdir()
    assert merge(models, tmp_path / "padded", "--add-pad-token") == 0
    again = (tmp_path / "padded", models / "zh.model", out, "--mode", "chinese-llama", "--add-pad-token")
    assert "--extra adds nothing" in both(*again)
    assert not out.exists()
    assert merge(models, models / "merged", "--overwrite") == 0


@pytest.mark.parametrize("command", ["split", ""])
def test_commands_that_do_not_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, *command.split())


def test_files_are_written_all_or_none(tmp_path: Path) -> None:
    from tokenizer.errors import TokenizerError

    with pytest.raises(TokenizerError, match="cannot write"):
        write_files("--output", {tmp_path / "a": b"1", tmp_path / "none" / "b": b"2"})
    assert list(tmp_path.iterdir()) == []
