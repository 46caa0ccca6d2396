"""Two small SentencePiece models, the second of which extends the first, put together piece by piece."""

from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

OLD, NEW = 700, 1000
_PIECE = ModelProto.SentencePiece
_KNOWN = [chr(0x4E00 + i) for i in range(OLD - 3 - 256 - 1 - 26)]  # characters of the first model; bytes for others
PIECES = [
    "一丁",
    "丁一",  # the same parts in another order
    "▁一丁",
    "一一丁丁",  # the same parts twice
    "龙",  # bytes only
    "一龙",
    "é一",  # a character of two bytes
    "ab",
    "7",  # a byte that is a whole character
    "[PAD]",
]


def base_model() -> ModelProto:
    """Byte fallback, letters and Chinese characters, with LLaMA's conventions."""
    model = ModelProto()
    for piece, kind in (("<unk>", _PIECE.UNKNOWN), ("<s>", _PIECE.CONTROL), ("</s>", _PIECE.CONTROL)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=_PIECE.BYTE)
    for rank, piece in enumerate(["▁", *map(chr, range(ord("a"), ord("z") + 1)), *_KNOWN]):
        model.pieces.add(piece=piece, score=-float(rank), type=_PIECE.NORMAL)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = OLD
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model


def extended_model() -> ModelProto:
    """PIECES, a control piece, and words of two characters."""
    model = base_model()
    for piece in PIECES:
        model.pieces.add(piece=piece, score=0.0, type=_PIECE.NORMAL)
    model.pieces.add(piece="<mask>", score=0.0, type=_PIECE.CONTROL)
    first = 100
    while len(model.pieces) < NEW:
        model.pieces.add(piece=_KNOWN[first] + _KNOWN[first % 7], score=0.0, type=_PIECE.NORMAL)
        first += 1
    return model


def write_models(folder: Path) -> tuple[Path, Path]:
    """Both models as files in `folder`."""
    paths = folder / "base.model", folder / "extended.model"
    for path, model in zip(paths, (base_model(), extended_model()), strict=True):
        path.write_bytes(model.SerializeToString())
    return paths
