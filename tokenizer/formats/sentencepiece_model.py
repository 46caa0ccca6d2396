"""SentencePiece models by their pieces: a whole one read, and which of its pieces some text can produce."""

from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.errors import TokenizerError
from tokenizer.formats.load import find, read_bytes
from tokenizer.formats.tokenizer_json import is_json, why_not_a_model


def read_model(flag: str, path: Path) -> ModelProto:
    """Parse a SentencePiece model: a `.model`, or a directory with a tokenizer.model.

    Raises:
        TokenizerError: it cannot be read, is cut off, or is something else; of a tokenizer.json the message says
            why it cannot stand in for a model.
    """
    file = find(flag, path)
    content = read_bytes(flag, file)
    if is_json(file, content):
        raise TokenizerError(f"{flag} {file} {why_not_a_model(content)}")
    try:
        proto = ModelProto.FromString(content)
    except Exception:  # protobuf's DecodeError, whose module differs between its implementations
        proto = ModelProto()
    if not proto.pieces:
        raise TokenizerError(f"{flag} {file} is not a SentencePiece model, or not the whole of one")
    if not proto.HasField("trainer_spec"):  # follows the pieces: a cut between two fields parses well
        raise TokenizerError(f"{flag} {file}: the end of this SentencePiece model is missing; copy it again")
    return proto


def unreachable(proto: ModelProto) -> list[int]:
    """Find the ids of the normal pieces that no text is encoded to, in order.

    A piece counts as reachable when its own text is encoded to it alone. For BPE nothing else can make it appear:
    where a text's encoding has the piece at some place, no merge crossed the borders of that place (the crossing
    symbol would still be there), so the merges inside it were chosen among the same candidates and in the same
    order (score, then from the left) as if the piece's text stood alone, and alone they give the piece too. For
    unigram models a cut of the piece that scores better than the piece does so in every text.

    Args:
        proto: a model of any type. Control, unknown, byte, unused and user-defined pieces are not looked at: they
            do not come from merges.
    """
    ids = [index for index, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL]
    pieces = [proto.pieces[index].piece for index in ids]
    encoded = piece_encoder(proto)(pieces)
    return [index for index, piece, parts in zip(ids, pieces, encoded, strict=True) if parts != [piece]]


def piece_encoder(proto: ModelProto) -> Callable[[Sequence[str]], list[list[str]]]:
    """Make a function that gives the pieces to which each of several texts, or pieces' own texts, is encoded.

    There is no dummy prefix and no trimming of spaces: whether a piece begins with `▁` because of a space or because
    a text begins there makes no difference to the merges.
    """
    model, space = _bare(proto)

    def encode(texts: Sequence[str]) -> list[list[str]]:
        given = [text.replace("▁", space) for text in texts]
        return model.encode(given, out_type=str, num_threads=1) if given else []

    return encode


def normalization_check(proto: ModelProto) -> Callable[[str], bool]:
    """Make a function that says whether the model's normalization leaves a piece's text as it is."""
    model, space = _bare(proto)
    return lambda text: model.normalize(text.replace("▁", space)) == text


def _bare(proto: ModelProto) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    bare = ModelProto()
    bare.CopyFrom(proto)
    bare.normalizer_spec.add_dummy_prefix = False
    bare.normalizer_spec.remove_extra_whitespaces = False
    model = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())
    return model, " " if proto.normalizer_spec.escape_whitespaces else "▁"
