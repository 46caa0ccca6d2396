"""A SentencePiece BPE model as `tokenizer.json`, the format of Hugging Face's tokenizers, where an exact one exists."""

from collections.abc import Iterator
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from tokenizer.tokenizer_json import first_token

_SPACE = "▁"


def why_no_fast_tokenizer(proto: ModelProto) -> str | None:
    """Why no `tokenizer.json` gives the ids of the model; None if one does.

    The format ranks merges by pair, so one of two pairs always goes first; SentencePiece merges the pair whose joint
    piece scores highest, and among equal scores the leftmost. Where `AB` and `BC` have one score, no ranking does
    the same. Equal scores of runs of one character, as of LLaMA's spaces, do no harm: the leftmost pair that may
    merge is the one that makes the longest run, and so is ranked first.
    """
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type != TrainerSpec.BPE or not trainer.byte_fallback:
        return "the model is not BPE with byte fallback"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        return "the model normalizes text"
    if any(piece.type in (piece.USER_DEFINED, piece.UNUSED) for piece in proto.pieces):
        return "the model has user-defined or unused pieces"
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    if any(letter not in normal for text in normal for letter in text):
        return "the model merges characters that have no piece"
    alike: dict[float, str] = {}
    for text, score in normal.items():
        if len(text) > 1 and len(set(text + alike.setdefault(score, text))) > 1 and alike[score] != text:
            return f"pieces have equal scores ({alike[score]!r} and {text!r}, for example)"
    return None


def fast_tokenizer(proto: ModelProto, special: dict[str, str], add_bos: bool = True) -> dict[str, Any]:
    """The content of `tokenizer.json` for a model of which `why_no_fast_tokenizer` has nothing to say.

    Args:
        proto: the model.
        special: the role of a special token (`bos_token`) to its piece.
        add_bos: texts begin with the token for that, if there is one.
    """
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip: list[dict[str, Any]] = []
    normalizers: list[dict[str, Any]] = [replace]
    if proto.normalizer_spec.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for index, text in sorted((ids[text], text) for text in set(special.values()))
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": first_token(special["bos_token"], ids[special["bos_token"]])
        if add_bos and "bos_token" in special
        else first_token(None, None),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": special.get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [list(pair) for pair in _merges(proto)],
        },
    }


def _merges(proto: ModelProto) -> Iterator[tuple[str, str]]:
    """All pairs of pieces whose joint text is a piece, the first to merge first.

    Pairs of one piece have one score. Where two of them overlap, `uv` and `vw` with uv = vw, the left one goes first;
    then v begins the piece, so the pair whose right part begins the piece is the left one.
    """
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    for text in sorted(normal, key=lambda text: (-normal[text], -len(text), text)):
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        possible = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
        yield from sorted(possible, key=lambda pair: (not text.startswith(pair[1]), -len(pair[0])))
