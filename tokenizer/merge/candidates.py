"""The pieces that a clean merge may add, and how often Chinese text is expected to use them."""

import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import exp

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from tokenizer.text.characters import chinese_runs, has_cjk

_SPACE = "▁"
_FULL_WIDTH = "，：；！？（）"
_CLAUSE_ENDS = "，。、：；！？"
# A piece with digits beside others would end the rule that every digit stands alone.
DIGITS, NOT_CJK, OTHER = "digits", "no CJK character", "characters of other scripts, or markup"


@dataclass(frozen=True)
class Candidates:
    """What an extra model offers.

    Attributes:
        frequency: text to the share of a text's tokens that it is expected to be. Pieces that the base has are among
            them, and marks without a CJK character.
        opening: word to the share of texts that it begins.
        space: share of tokens that are a space, or the beginning of a text, alone.
        pieces: what may be added: texts of `frequency` with a CJK character that the base lacks.
        dropped: reason to pieces of the extra model that may not.
    """

    frequency: dict[str, float]
    opening: dict[str, float]
    space: float
    pieces: list[str]
    dropped: dict[str, list[str]]


def candidates(base_pieces: Collection[str], extra: ModelProto) -> Candidates:
    """Find the pieces of `extra` that have a CJK character and nothing that is not Chinese text.

    A model whose normalization folds full-width punctuation to ASCII (NFKC) has `),` where texts have `），`: in
    pieces of punctuation that is undone.

    Args:
        base_pieces: pieces of the base.
        extra: a model of any type.
    """
    shares = _frequencies(extra)
    unfold = _unfolded(extra)
    openings = sum(share for piece, share in shares.items() if piece.startswith(_SPACE))
    found = Candidates({}, {}, shares.get(_SPACE, 0.0), [], {DIGITS: [], NOT_CJK: [], OTHER: []})
    for piece, share in shares.items():
        text = piece.translate(unfold) if _is_punctuation(piece.lstrip(_SPACE)) else piece
        reason = why_not(text)
        if reason is None and text not in base_pieces and text not in found.frequency:
            found.pieces.append(text)
        if reason is None or _is_punctuation(text):
            found.frequency[text] = found.frequency.get(text, 0.0) + share
        if reason and piece not in base_pieces:
            found.dropped[reason].append(piece)
        if text.startswith(_SPACE):
            found.opening[text[1:]] = share / openings
    return found


def compounds(base_pieces: Collection[str], found: Candidates, least: float) -> dict[str, float]:
    """Join words and marks, or a space and words, in one piece; with the share of tokens that each is expected to be.

    SentencePiece's trainer cuts between scripts, so an extra model has no word with a mark, however frequent it is.
    The two are taken to follow each other by chance, but for what follows a space or the end of a clause: there, half
    of a word's probability is that of opening a text (the extra model's `▁` pieces).

    Args:
        base_pieces: pieces of the base.
        found: what the extra model offers.
        least: smaller expected shares are left out.
    """
    words = {text: share for text, share in found.frequency.items() if text.isalpha()}
    marks = {text: share for text, share in found.frequency.items() if len(text) == 1 and _is_mark(text)}
    expected: dict[str, float] = {}
    for mark, share in marks.items():
        for word, word_share in words.items():
            first = (word_share + found.opening.get(word, 0.0)) / 2 if mark in _CLAUSE_ENDS else word_share
            expected[mark + word] = share * first
            expected[word + mark] = share * word_share
    for word, word_share in words.items():
        expected[_SPACE + word] = found.space * (word_share + found.opening.get(word, 0.0)) / 2
    return {
        text: value
        for text, value in expected.items()
        if value >= least and text not in base_pieces and text not in found.frequency
    }


def why_not(text: str) -> str | None:
    """Say why a clean merge may not add this piece; None if it may."""
    body = text.removeprefix(_SPACE)
    if len(body) > 1 and any(letter.isdecimal() for letter in body):
        return DIGITS
    if not has_cjk(body):
        return NOT_CJK
    return None if _is_chinese(body) else OTHER


def standard_characters() -> frozenset[str]:
    """List the common characters: GB 2312 level 1 (3,755, simplified) and Big5 level 1 (5,401, traditional)."""
    return frozenset(_coded("gb2312", 0xB0, 0xD7)) | frozenset(_coded("big5", 0xA4, 0xC6))


def traditional_characters() -> frozenset[str]:
    """List common characters that only traditional text has: in Big5 level 1, nowhere in GB 2312."""
    return frozenset(_coded("big5", 0xA4, 0xC6)) - frozenset(_coded("gb2312", 0xB0, 0xF7))


def _coded(codec: str, first: int, last: int) -> Iterator[str]:
    """Han characters whose first byte in a two-byte code is within `first` to `last`: a level of the standard."""
    for letter in map(chr, range(0x4E00, 0xA000)):
        try:
            if first <= letter.encode(codec)[0] <= last:
                yield letter
        except UnicodeEncodeError:
            pass


def _frequencies(extra: ModelProto) -> dict[str, float]:
    """Normal pieces and their shares of the tokens of a text.

    The scores of a unigram model are log-probabilities (Kudo, arXiv 1804.10959, section 3.2). Those of a BPE model
    are the order in which its pieces were found, the characters after the merges: there Zipf's law is assumed.
    """
    pieces = [piece for piece in extra.pieces if piece.type == piece.NORMAL]
    if extra.trainer_spec.model_type == TrainerSpec.UNIGRAM:
        return {piece.piece: exp(piece.score) for piece in pieces}
    ordered = sorted(pieces, key=lambda piece: -piece.score)
    rank: dict[str, int] = {}
    for group in ([p for p in ordered if len(p.piece) == 1], [p for p in ordered if len(p.piece) > 1]):
        rank |= {piece.piece: place for place, piece in enumerate(group, start=1)}
    total = sum(1 / place for place in rank.values())
    return {text: 1 / place / total for text, place in rank.items()}


def _unfolded(extra: ModelProto) -> Mapping[int, str]:
    model = sentencepiece.SentencePieceProcessor(model_proto=extra.SerializeToString())
    folded = {mark: model.normalize(mark).strip(_SPACE) for mark in _FULL_WIDTH}
    return {ord(ascii): mark for mark, ascii in folded.items() if len(ascii) == 1 and ascii != mark}


def _is_chinese(text: str) -> bool:
    run = f"中{text}"  # marks that other languages share make no run of their own
    return list(chinese_runs(run)) == [run]


def _is_mark(letter: str) -> bool:
    return _is_punctuation(letter) and _is_chinese(letter)


def _is_punctuation(text: str) -> bool:
    return text != "" and all(unicodedata.category(letter)[0] == "P" for letter in text)
