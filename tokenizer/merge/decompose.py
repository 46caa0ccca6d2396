"""What the new pieces of an extended model are made of in the model that it extends."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.errors import TokenizerError
from tokenizer.formats.sentencepiece_model import piece_encoder, read_model
from tokenizer.merge.chinese_llama import PAD

# An old id, and how many characters it stands for: a byte of a character of three bytes stands for a third.
Part = tuple[int, Fraction]

_TEXT = (ModelProto.SentencePiece.NORMAL, ModelProto.SentencePiece.USER_DEFINED)
_BYTE = ModelProto.SentencePiece.BYTE


@dataclass(frozen=True)
class Decomposition:
    """The new pieces of a model that extends another.

    Attributes:
        old_size: pieces of the model that is extended; ids from here on are new.
        parts: of every new piece in the order of ids; none for pieces that stand for no text.
        of_bytes: new pieces that consist of byte pieces only.
    """

    old_size: int
    parts: tuple[tuple[Part, ...], ...]
    of_bytes: int

    @cached_property
    def distinct(self) -> int:
        """Old pieces that are part of any new one."""
        return len({index for parts in self.parts for index, _ in parts})


def decompose(base_flag: str, base: Path, flag: str, extended: Path) -> Decomposition:
    """Encode every new piece of a model with the model that it extends.

    The text is encoded as it is: without the space that SentencePiece puts before a text, which would make the
    space piece a part of nearly every word. Pieces that begin with a space keep it.

    Args:
        base_flag, flag: start the messages.
        base, extended: SentencePiece models, as `read_model` takes them.

    Raises:
        TokenizerError: one is no model, or the second is not the first with further pieces.
    """
    old, new = read_model(base_flag, base), read_model(flag, extended)
    _check_extends(old, new, f"{flag} {extended}", f"{base_flag} {base}")
    size = len(old.pieces)
    encoded = piece_encoder(old)(_texts(new, size))
    ids = {piece.piece: index for index, piece in enumerate(old.pieces) if piece.type in (*_TEXT, _BYTE)}
    parts = tuple(tuple(_parts(pieces, ids, old)) for pieces in encoded)
    of_bytes = sum(bool(part) and all(old.pieces[index].type == _BYTE for index, _ in part) for part in parts)
    return Decomposition(size, parts, of_bytes)


def _check_extends(old: ModelProto, new: ModelProto, new_name: str, old_name: str) -> None:
    for index, (before, after) in enumerate(zip(old.pieces, new.pieces, strict=False)):
        if before.piece != after.piece:
            raise TokenizerError(
                f"{new_name} does not extend {old_name}: id {index} is {after.piece!r} here and {before.piece!r} there"
            )
    if len(new.pieces) <= len(old.pieces):
        raise TokenizerError(
            f"{new_name} adds nothing to {old_name}: it has {len(new.pieces)} pieces, the base {len(old.pieces)}"
        )


def _texts(model: ModelProto, first: int) -> list[str]:
    """What the pieces from id `first` on stand for; nothing for control pieces and padding."""
    special = {model.trainer_spec.pad_piece, PAD}  # Chinese-Alpaca's is of type normal
    return [piece.piece if piece.type in _TEXT and piece.piece not in special else "" for piece in model.pieces[first:]]


def _parts(pieces: list[str], ids: dict[str, int], model: ModelProto) -> Iterator[Part]:
    share = Fraction(1)
    for piece in pieces:
        index = ids.get(piece, model.trainer_spec.unk_id)
        if model.pieces[index].type == _BYTE:
            share = _share_of_byte(int(piece[3:5], 16), share)
            yield index, share
        else:
            yield index, Fraction(len(piece))


def _share_of_byte(byte: int, before: Fraction) -> Fraction:
    """Of a character, by UTF-8's first byte of it; the bytes that continue it have the same share as those `before`."""
    if byte < 0x80:
        return Fraction(1)
    if byte < 0xC0:
        return before
    return Fraction(1, 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
