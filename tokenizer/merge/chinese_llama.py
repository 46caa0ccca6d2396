"""Add to a base model pieces of another that it lacks."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.errors import TokenizerError

MODES = ("clean", "chinese-llama")
PAD = "[PAD]"
EXTRA_PIECES, PADDING = "pieces of the extra model", "padding"  # kinds of new pieces


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        mode: the rule.
        proto: the model; ids of the base are unchanged, new pieces follow.
        base, extra: pieces of the two models.
        groups: kind to new pieces, each piece in one of them.
        dropped: reason to pieces of the extra model that the base lacks and that were not added.
    """

    mode: str
    proto: ModelProto
    base: int
    extra: int
    groups: dict[str, list[str]]
    dropped: dict[str, list[str]]

    @property
    def added(self) -> int:
        """New pieces."""
        return len(self.proto.pieces) - self.base


def new_pieces(base: ModelProto, extra: ModelProto) -> list[str]:
    """List the pieces of `extra` whose string `base` lacks, in `extra`'s order.

    Raises:
        TokenizerError: there is none.
    """
    base_pieces = {piece.piece for piece in base.pieces}
    new = [piece.piece for piece in extra.pieces if piece.piece not in base_pieces]
    if not new:
        raise TokenizerError(f"--extra adds nothing: the base has all of its {len(extra.pieces):,} pieces")
    return new


def merge_chinese_llama(base: ModelProto, extra: ModelProto, *, pad: bool = False) -> Merged:
    """Add every piece of `extra` whose string `base` lacks, in `extra`'s order: the rule published with Chinese-LLaMA.

    New pieces have score 0 and type normal, whatever they were in `extra`. As all of the base's learned scores are
    negative, new pieces are merged before old ones, and among themselves from left to right.

    Args:
        base, extra: models of any type.
        pad: append `[PAD]` as published with Chinese-Alpaca: a piece like the others, which the model does not know
            as padding.

    Raises:
        TokenizerError: `extra` has no new piece, or the model has a piece for padding already.
    """
    proto = ModelProto()
    proto.CopyFrom(base)
    groups = {EXTRA_PIECES: new_pieces(base, extra), PADDING: [PAD] if pad else []}
    if pad:
        refuse_second_pad(base, groups[EXTRA_PIECES])
    for text in chain.from_iterable(groups.values()):
        proto.pieces.add(piece=text, score=0.0)
    return Merged("chinese-llama", proto, len(base.pieces), len(extra.pieces), groups, {})


def refuse_second_pad(base: ModelProto, new: Iterable[str]) -> None:
    """Raise TokenizerError where a model has a piece for padding already."""
    if base.trainer_spec.pad_id >= 0 or PAD in new or any(piece.piece == PAD for piece in base.pieces):
        raise TokenizerError("--add-pad-token: the model has a piece for padding already")
