"""What new pieces are made of, against sentencepiece's own encoding."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import sentencepiece

from tests.tokenizer.extended import NEW, OLD, PIECES, extended_model, write_models
from tokenizer.errors import TokenizerError
from tokenizer.merge.decompose import Decomposition, decompose

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def new(models: tuple[Path, Path]) -> Decomposition:
    return decompose("--base", models[0], "--new", models[1])


def after_a_line_end(model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """The ids of a text that stands behind another, where no space is put before it."""
    marker = model.encode("\n")
    ids = model.encode("\n" + text)
    assert ids[: len(marker)] == marker
    return ids[len(marker) :]


def test_parts_are_sentencepieces(models: tuple[Path, Path], new: Decomposition) -> None:
    base = sentencepiece.SentencePieceProcessor(model_file=str(models[0]))
    pieces = [piece.piece for piece in extended_model().pieces][OLD:]
    assert len(new.parts) == len(pieces) == NEW - OLD
    for piece, parts in zip(pieces, new.parts, strict=True):
        if piece in ("[PAD]", "<mask>"):
            assert parts == ()
            continue
        text = piece.replace("▁", " ")
        assert [index for index, _ in parts] == after_a_line_end(base, text)
        assert sum(characters for _, characters in parts) == len(text)
    space = base.piece_to_id("▁")
    with_space = [piece for piece, parts in zip(pieces, new.parts) if space in dict(parts)]
    assert with_space == ["▁一丁"]


def test_bytes_share_their_character(new: Decomposition) -> None:
    parts = dict(zip(PIECES, new.parts))
    third, half, one = Fraction(1, 3), Fraction(1, 2), Fraction(1)
    assert [share for _, share in parts["龙"]] == [third] * 3
    assert [share for _, share in parts["一龙"]] == [one, third, third, third]
    assert [share for _, share in parts["é一"]] == [half, half, one]
    assert [share for _, share in parts["7"]] == [one]
    assert new.of_bytes == 2  # 龙 and 7
    assert new.distinct == len({index for piece in new.parts for index, _ in piece})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda m: setattr(m.pieces[500], "piece", "x500"), "id 500 is 'x500' here and "),
        (lambda m: m.pieces.__delitem__(slice(OLD, None)), f"it has {OLD} pieces, the base {OLD}"),
        (lambda m: m.pieces.__delitem__(slice(600, None)), f"it has 600 pieces, the base {OLD}"),
        (lambda m: m.pieces.__delitem__(slice(None, None)), "is not a SentencePiece model"),
    ],
)
def test_a_model_that_does_not_extend_is_refused(
    models: tuple[Path, Path], tmp_path: Path, spoil: Callable[[object], object], message: str
) -> None:
    model = extended_model()
    spoil(model)
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    with pytest.raises(TokenizerError) as error:
        decompose("--base", models[0], "--new", tmp_path / "other.model")
    assert message in str(error.value)
    assert str(error.value).startswith(f"--new {tmp_path}")
    assert "\n" not in str(error.value)


def test_a_truncated_model_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "cut.model").write_bytes(models[1].read_bytes()[:-1])
    with pytest.raises(TokenizerError, match=r"^--new \S+cut.model"):
        decompose("--base", models[0], "--new", tmp_path / "cut.model")


@pytest.mark.skipif(not (SHARED / "llama.model").is_file(), reason="needs the published models")
def test_the_published_vocabulary(tmp_path: Path) -> None:
    from tokenizer.formats.sentencepiece_model import read_model
    from tokenizer.merge.chinese_llama import merge_chinese_llama

    base, extra = (read_model("", SHARED / f"{name}.model") for name in ("llama", "chinese_sp"))
    merged = merge_chinese_llama(base, extra).proto
    (tmp_path / "new.model").write_bytes(merged.SerializeToString())
    new = decompose("", SHARED / "llama.model", "", tmp_path / "new.model")
    assert (len(new.parts), new.of_bytes, new.distinct) == (17953, 7810, 866)
    space = next(index for index, piece in enumerate(base.pieces) if piece.piece == "▁")
    assert all("▁" in piece.piece for piece, parts in zip(merged.pieces[32000:], new.parts) if space in dict(parts))
