"""The files with which transformers' AutoTokenizer loads a SentencePiece model.

An exact `tokenizer.json` is written where there is one (`why_no_fast_tokenizer`), and transformers runs that. Its class
is the general one, which does what the file says: transformers' LlamaTokenizer has a way of its own with leading
spaces. Else, as after a merge with equal scores (on Chinese prose about one line in eleven would be cut differently),
there is none, and `SentencePieceBackend` (transformers 5) runs the model itself.
"""

import json
from collections.abc import Iterator
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from tokenizer.formats.tokenizer_json import bos_post_processor

HUGGINGFACE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def huggingface_files(proto: ModelProto, pad_token: str | None = None, add_bos: bool = True) -> dict[str, bytes]:
    """Make the files to lie beside `tokenizer.model`, among them `tokenizer.json` where there is an exact one.

    As sentencepiece, a `</s>` within a text is text (`split_special_tokens=False` makes it the token). One limit is
    transformers' own: SentencePieceBackend's decoding shows byte pieces as `<0x0A>`; sentencepiece decodes them.

    Args:
        proto: the model.
        pad_token: the piece for padding, where the model does not say.
        add_bos: encoding puts the begin-of-sentence token first, as LLaMA's tokenizer does, unless it is called with
            `add_special_tokens=False`.
    """
    names = _special_tokens(proto)
    if pad_token:
        names["pad_token"] = pad_token
    exact = why_no_fast_tokenizer(proto) is None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if exact else "SentencePieceBackend",
        **names,
        "legacy": True,  # SentencePieceBackend: encode with the model as it is, its dummy prefix included
        "special_tokens_pattern": "bos" if add_bos and "bos_token" in names else "none",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    fast = {"tokenizer.json": _json(fast_tokenizer(proto, names, add_bos))} if exact else {}
    return {**fast, "tokenizer_config.json": _json(config), "special_tokens_map.json": _json(names)}


def _special_tokens(proto: ModelProto) -> dict[str, str]:
    trainer = proto.trainer_spec
    ids = {
        "unk_token": trainer.unk_id,
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
        "pad_token": trainer.pad_id,
    }
    return {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


_SPACE = "▁"


def why_no_fast_tokenizer(proto: ModelProto) -> str | None:
    """Say why no `tokenizer.json` gives the ids of the model; None if one does.

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
    first_of_score: dict[float, str] = {}
    for text, score in normal.items():
        if len(text) > 1 and (first := first_of_score.setdefault(score, text)) != text and len(set(text + first)) > 1:
            return f"pieces have equal scores ({first!r} and {text!r}, for example)"
    return None


def fast_tokenizer(proto: ModelProto, special: dict[str, str], add_bos: bool = True) -> dict[str, Any]:
    """Make the content of `tokenizer.json` for a model of which `why_no_fast_tokenizer` has nothing to say.

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
        "post_processor": bos_post_processor(special["bos_token"], ids[special["bos_token"]])
        if add_bos and "bos_token" in special
        else bos_post_processor(None, None),
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
