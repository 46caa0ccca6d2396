"""python -m tokenizer merge --mode clean: what it promises, and what is refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.__main__ import main
from tokenizer.formats.sentencepiece_model import read_model, unreachable
from tokenizer.text.characters import chinese_runs, has_cjk

ENGLISH = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Training a language model needs text, time and patience; 12345 tokens are not enough.",
    "    indented code = [1, 2, 3]  # “quoted”, – dashed — and more…",
    "中 文 的 是 在 人 工 ， 。 can be base pieces too",
]
CHINESE = [
    "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。",
    "语言模型的训练需要大量的文本，人工智能的训练也需要大量的时间，而时间是有限的。",
    "科学家说：“计算机科学是一门学科，但是心理学也是一门学科。”",
    "如果模型需要时间，那么训练也需要时间；如果文本很多，那么模型很大。",
    "他在2016年说，“人工智能”、“机器学习”和《科学》都需要人（也需要机器）。",
    "繁體中文的文本也需要訓練，語言模型的時間是有限的。",
]
OTHER_CHINESE = ["机器语言和机器语言文本，都是时间和机器语言的科学。"] * 3
LETTERS = [*"".join(ENGLISH + CHINESE), "  ", "▁", "\n", "\x00", "是", "，", "科学", "时间"]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(LETTERS), st.characters(codec="utf-8")), max_size=30).map("".join)


def train(output: Path, lines: list[str], size: int, kind: str) -> None:
    source = output.with_suffix(".txt")
    source.write_text("\n".join(lines * 3), "utf-8")
    command = ["train", "--input", source, "--vocab-size", size, "--model-type", kind, "--output", output]
    assert main([*map(str, command), "--quiet", "--no-hard-vocab-limit"]) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with en.model (BPE), zh.model (unigram), corpus.txt and a clean merge in merged/."""
    directory = tmp_path_factory.mktemp("clean")
    train(directory / "en.model", ENGLISH, 420, "bpe")
    train(directory / "zh.model", CHINESE, 450, "unigram")
    (directory / "corpus.txt").write_text("\n".join(OTHER_CHINESE), "utf-8")
    assert merge(directory, directory / "merged", "--add-pad-token") == 0
    return directory


def merge(models: Path, output: Path, *flags: object, base: str = "en.model", extra: str = "zh.model") -> int:
    command = ["merge", "--base", models / base, "--extra", models / extra, "--output", output, "--quiet", *flags]
    return main([*map(str, command)])


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def tokens(model: sentencepiece.SentencePieceProcessor, texts: list[str]) -> int:
    return sum(map(len, model.encode(texts, num_threads=1)))


def check_promises(directory: Path, base_file: Path) -> None:
    base, proto = read_model("", base_file), read_model("", directory)
    count = len(base.pieces)
    assert list(proto.pieces[:count]) == list(base.pieces)
    new = [piece for piece in proto.pieces[count:] if piece.type == piece.NORMAL]
    assert all(has_cjk(piece.piece) for piece in new)
    assert not [piece.piece for piece in new if len(piece.piece) > 1 and any(map(str.isdecimal, piece.piece))]
    scores = [piece.score for piece in new]
    assert all(left > right for left, right in pairwise(scores))
    assert scores[0] < min(piece.score for piece in base.pieces)
    assert set(unreachable(proto)) <= set(unreachable(base))
    report = json.loads((directory / "merge_report.json").read_text("utf-8"))
    assert report["new_pieces"] == len(proto.pieces) - count
    listed = [text for group in report["added"].values() for text in group]
    assert sorted(listed) == sorted(piece.piece for piece in proto.pieces[count:])
    assert report["unreachable_new_pieces"] == report["lost_base_pieces"] == []


def test_the_promises_of_a_clean_merge(models: Path) -> None:
    check_promises(models / "merged", models / "en.model")
    proto = read_model("", models / "merged")
    base, extra = (read_model("", models / f"{name}.model") for name in ("en", "zh"))
    known = {piece.piece for piece in base.pieces}
    new = [piece.piece for piece in extra.pieces if piece.piece not in known]
    assert len(proto.pieces) == len(base.pieces) + len(new) + 1  # no larger than the published rule, and [PAD]
    characters = {text for text in new if len(text) == 1 and has_cjk(text)}
    assert characters <= {piece.piece for piece in proto.pieces}
    merged, before = load(models / "merged" / "tokenizer.model"), load(models / "en.model")
    assert tokens(merged, CHINESE) < 0.6 * tokens(before, CHINESE)


def test_padding_cannot_come_from_text(models: Path) -> None:
    model = load(models / "merged" / "tokenizer.model")
    assert model.pad_id() == model.vocab_size() - 1
    assert model.id_to_piece(model.pad_id()) == "[PAD]"
    assert model.pad_id() not in model.encode("text [PAD] [PAD]")
    settings = json.loads((models / "merged" / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "[PAD]"


@pytest.fixture(scope="module")
def model(models: Path) -> sentencepiece.SentencePieceProcessor:
    """The merged model."""
    return load(models / "merged" / "tokenizer.model")


@pytest.fixture(scope="module")
def base(models: Path) -> sentencepiece.SentencePieceProcessor:
    """Its base."""
    return load(models / "en.model")


@pytest.fixture(scope="module")
def fast(models: Path) -> Any:
    """The merged model by transformers, which runs tokenizer.json."""
    transformers = pytest.importorskip("transformers", minversion="5")
    return transformers.AutoTokenizer.from_pretrained(str(models / "merged"))


@given(text=ANY_TEXT)
@settings(max_examples=500, deadline=None, database=None)
def test_any_text_survives_and_text_without_cjk_is_untouched(
    model: sentencepiece.SentencePieceProcessor, base: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    decoded = model.decode(model.encode(text))
    assert decoded == base.decode(base.encode(text))
    assert decoded == text.replace("▁", " ")  # the base's one exception
    other = "".join(letter for letter in text if not has_cjk(letter))
    assert model.encode(other) == base.encode(other)


@given(text=ANY_TEXT)
@settings(max_examples=500, deadline=None, database=None)
def test_the_fast_tokenizer_gives_the_same_ids(
    model: sentencepiece.SentencePieceProcessor, fast: Any, text: str
) -> None:
    ids = model.encode(text)
    assert fast.encode(text, add_special_tokens=False) == ids
    assert fast.decode(ids) == model.decode(ids)


def test_slow_and_fast_tokenizers_agree(models: Path, model: sentencepiece.SentencePieceProcessor, fast: Any) -> None:
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    slow = SentencePieceBackend.from_pretrained(str(models / "merged"))
    assert fast.is_fast
    special = ["text [PAD] <s> </s> <unk>", "[PAD]", "<s>中文</s>"]
    for text in [*ENGLISH, *CHINESE, *special, "", " ", "  中文", *(" " * count + "x" for count in range(40))]:
        assert slow.encode(text) == fast.encode(text) == [1, *model.encode(text)]
    for name in ("unk", "bos", "eos", "pad"):
        ids = {getattr(slow, f"{name}_token_id"), getattr(fast, f"{name}_token_id"), getattr(model, f"{name}_id")()}
        assert len(ids) == 1


def test_a_corpus_is_learned_from(models: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in OTHER_CHINESE * 1000))
    flags = ("--corpus", tmp_path / "corpus.jsonl", "--json-key", "body")
    for name in ("a", "b"):
        assert merge(models, tmp_path / name, *flags) == 0
    contents = [(tmp_path / name / "tokenizer.model").read_bytes() for name in ("a", "b")]
    assert contents[0] == contents[1]
    check_promises(tmp_path / "a", models / "en.model")
    tuned = load(tmp_path / "a" / "tokenizer.model")
    assert tokens(tuned, OTHER_CHINESE) < tokens(load(models / "merged" / "tokenizer.model"), OTHER_CHINESE)
    report = json.loads((tmp_path / "a" / "merge_report.json").read_text("utf-8"))
    runs = [run for text in OTHER_CHINESE * 1000 for run in chinese_runs(text)]
    assert report["corpus"]["characters"] == sum(map(len, runs))
    counted = report["corpus"]["tokens"]
    assert counted["clean"] < counted["chinese-llama"] < counted["base"]


def test_sizes(models: Path, tmp_path: Path) -> None:
    base = len(read_model("", models / "en.model").pieces)
    for size in (base + 1, base + 30, base + 2000):
        assert merge(models, tmp_path / str(size), "--target-size", size) == 0
        assert len(read_model("", tmp_path / str(size)).pieces) == size
        check_promises(tmp_path / str(size), models / "en.model")
    assert merge(models, tmp_path / "padded", "--target-size", base + 30, "--add-pad-token") == 0
    assert len(read_model("", tmp_path / "padded").pieces) == base + 30


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_models_of_other_makes(kind: str, normalization: str, tmp_path: Path) -> None:
    for name, lines, model_type in (("base", ENGLISH, "bpe"), ("extra", CHINESE, kind)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 3),
            model_prefix=str(tmp_path / name),
            vocab_size=450,
            model_type=model_type,
            byte_fallback=name == "base",
            normalization_rule_name=normalization,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    before = {piece.piece for piece in read_model("", tmp_path / "base.model").pieces}
    assert merge(tmp_path, tmp_path / "merged", base="base.model", extra="extra.model") == 0
    check_promises(tmp_path / "merged", tmp_path / "base.model")
    assert not (tmp_path / "merged" / "tokenizer.json").exists()  # SentencePiece's defaults trim spaces
    base, model = load(tmp_path / "base.model"), load(tmp_path / "merged" / "tokenizer.model")
    assert tokens(model, CHINESE) < 0.7 * tokens(base, CHINESE)
    new = {piece.piece for piece in read_model("", tmp_path / "merged").pieces} - before
    if normalization == "nmt_nfkc":  # what the base folds cannot be reached
        assert not [piece for piece in new if set(piece) & set("，：（）")]


def test_punctuation_that_the_extra_model_folds_is_unfolded(models: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["他说“好”，我说“不好”，他又说“好”，我也说“好”，大家说“都好”，就好"] * 9),
        model_prefix=str(tmp_path / "folded"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folded = {piece.piece for piece in read_model("", tmp_path / "folded.model").pieces}
    assert "”," in folded
    assert merge(models, tmp_path / "out", "--target-size", 440, extra=str(tmp_path / "folded.model")) == 0
    new = {piece.piece for piece in read_model("", tmp_path / "out").pieces[len(load(models / "en.model")) :]}
    assert "”，" in new
    assert not [piece for piece in new if "," in piece]


def refused(capsys: pytest.CaptureFixture[str], output: Path, *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in ("merge", "--quiet", "--output", output, *words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert not output.exists()
    return lines[0]


def test_bad_requests(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, en, zh = tmp_path / "out", models / "en.model", models / "zh.model"

    def both(base: Path, extra: Path, *flags: object) -> str:
        return refused(capsys, out, "--base", base, "--extra", extra, *flags)

    assert "--base is a unigram model: --mode clean needs a BPE model" in both(zh, zh)
    assert "--extra adds nothing: the base has all of its" in both(en, en)
    (tmp_path / "cut.model").write_bytes(en.read_bytes()[:-200])
    assert "cut.model" in both(tmp_path / "cut.model", zh)
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "ByteLevel"},
    }))  # fmt: skip
    assert "byte-level BPE" in both(tmp_path / "tokenizer.json", zh)
    base = len(read_model("", en).pieces)
    assert f"the base has {base}; give {base + 1} or more" in both(en, zh, "--target-size", 100)
    assert f"give {base + 2} or more" in both(en, zh, "--target-size", base + 1, "--add-pad-token")
    message = both(en, zh, "--target-size", 10**6)
    most = int(message.split("these models yield ")[1].split()[0])
    assert base < most < 10**6
    (tmp_path / "empty.txt").touch()
    (tmp_path / "english.txt").write_text("nothing to learn here\n")
    for name in ("empty.txt", "english.txt"):
        assert "--corpus holds no Chinese text" in both(en, zh, "--corpus", tmp_path / name)
    assert "--corpus" in both(en, zh, "--corpus", tmp_path / "none.txt")
    assert "there is no --corpus" in both(en, zh, "--json-key", "body")
    train(tmp_path / "latin.model", ["unrelated words of Latin letters"], 290, "unigram")
    assert "no Chinese piece that the base lacks" in both(en, tmp_path / "latin.model")
    padded = models / "merged"
    assert "--add-pad-token: the model has a piece for padding" in both(padded, zh, "--add-pad-token")
    assert merge(models, tmp_path / "most", "--target-size", most) == 0  # what the message says is true


def test_overwriting_leaves_nothing_of_another_mode(models: Path, tmp_path: Path) -> None:
    assert merge(models, tmp_path / "out") == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert merge(models, tmp_path / "out", "--mode", "chinese-llama", "--overwrite") == 0
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_unreachable_pieces(models: Path) -> None:
    proto = read_model("", models / "en.model")
    assert unreachable(proto) == []
    count = len(proto.pieces)
    for text in ("the qui", "zqzq", "▁中文"):
        proto.pieces.add(piece=text, score=-1e6)
    proto.pieces.add(piece="中文", score=-1e6)
    assert unreachable(proto) == [count, count + 1]  # `▁中文` is `▁` and `中文`
