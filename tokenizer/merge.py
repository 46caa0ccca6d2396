"""Add to a base model the pieces of another that it lacks."""

from dataclasses import dataclass

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

MODES = ("chinese-llama",)


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        proto: the model; ids of the base are unchanged, new pieces follow.
        base, extra: pieces of the two models.
        duplicates: pieces of the extra model that the base already had.
    """

    proto: ModelProto
    base: int
    extra: int
    duplicates: int

    @property
    def added(self) -> int:
        """New pieces."""
        return len(self.proto.pieces) - self.base


def merge_chinese_llama(base: ModelProto, extra: ModelProto) -> Merged:
    """The rule published with Chinese-LLaMA: every piece of `extra` whose string `base` lacks, in `extra`'s order.

    New pieces have score 0 and type normal, whatever they were in `extra`. As all of the base's learned scores are
    negative, new pieces are merged before old ones, and among themselves from left to right.
    """
    proto = ModelProto()
    proto.CopyFrom(base)
    known = {piece.piece for piece in base.pieces}
    for piece in extra.pieces:
        if piece.piece not in known:
            proto.pieces.add(piece=piece.piece, score=0.0)
            known.add(piece.piece)
    added = len(proto.pieces) - len(base.pieces)
    return Merged(proto, len(base.pieces), len(extra.pieces), len(extra.pieces) - added)
