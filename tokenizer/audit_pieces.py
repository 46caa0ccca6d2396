"""Checks of a vocabulary that need no text."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.finding import Finding, judged, share
from tokenizer.interface import Tokenizer, TokenizerFile
from tokenizer.reachable import unreachable

# Among them is each byte that UTF-8 can have, at each place that it can have.
_PROBES = [chr(code) for code in (*range(0x800), *range(0x800, 0x110000, 0x3F1)) if not 0xD800 <= code < 0xE000]


def check_duplicates(entries: Iterable[tuple[str, int]]) -> Finding:
    """Whether a piece has several ids, or an id several pieces.

    Args:
        entries: piece and id, as often as the file has them.
    """
    ids: defaultdict[str, list[int]] = defaultdict(list)
    pieces: defaultdict[int, set[str]] = defaultdict(set)
    for piece, index in entries:
        ids[piece].append(index)
        pieces[index].add(piece)
    twice = [f"{piece!r} has the ids {found}" for piece, found in ids.items() if len(found) > 1]
    twice += [f"id {index} is {sorted(found)}" for index, found in pieces.items() if len(found) > 1]
    summary = f"{len(twice):,} of {len(pieces):,} pieces are there twice" if twice else "no two pieces are alike"
    return judged("duplicates", bool(twice), summary, twice, {"all": twice})


def check_coverage(tokenizer: Tokenizer) -> Finding:
    """Whether any character can be encoded: some three thousand that together have every byte of UTF-8."""

    def is_lost(letter: str) -> bool:
        ids = tokenizer.encode(letter)
        return not ids or tokenizer.unk_id in ids

    lost = [f"U+{ord(letter):04X}" for letter in _PROBES if is_lost(letter)]
    summary = "any character can be encoded, if need be as bytes"
    if lost:
        summary = f"{share(len(lost), len(_PROBES))} characters tried become <unk> or vanish: no full byte fallback"
    return judged("any character", bool(lost), summary, lost, {"lost": lost})


def dead_pieces(proto: ModelProto) -> frozenset[int]:
    """Ids of pieces that no text is encoded to; control pieces, which are meant so, among them."""
    silent = {index for index, piece in enumerate(proto.pieces) if piece.type in (piece.CONTROL, piece.UNUSED)}
    return frozenset(silent.union(unreachable(proto)))


def check_dead(proto: ModelProto, dead: frozenset[int], base: TokenizerFile | None) -> Finding:
    """Normal and unused pieces that no text is encoded to; those that the base lacks count as new.

    Args:
        proto: the model.
        dead: its `dead_pieces`.
        base: what the model extends.
    """
    normal = [index for index, piece in enumerate(proto.pieces) if piece.type in (piece.NORMAL, piece.UNUSED)]
    ids = [index for index in normal if index in dead]
    summary = f"{share(len(ids), len(normal))} normal pieces are produced by no text"
    known = set(base.pieces.values()) if base else set()
    new = [index for index in ids if proto.pieces[index].piece not in known]
    if ids and base:
        summary += f"; {len(new):,} of them are new, {len(ids) - len(new):,} the base has too"
    examples = [f"{index} {proto.pieces[index].piece!r}" for index in new or ids]
    return judged("dead pieces", bool(ids), summary, examples, {"ids": ids, "new_ids": new})


def check_lost(
    tokenizer: TokenizerFile, base: TokenizerFile, dead: frozenset[int] | None, base_dead: frozenset[int] | None
) -> Finding:
    """Pieces of the base that are absent, have another id, or can no longer be produced though the base does.

    Args:
        tokenizer: what extends the base.
        base: the base.
        dead, base_dead: their `dead_pieces`, None where these are not known.
    """
    silenced = frozenset() if dead is None or base_dead is None else dead - base_dead
    where = {piece: index for index, piece in tokenizer.pieces.items()}
    lost: dict[str, list[int]] = {"absent": [], "moved": [], "not produced": []}
    for index, piece in base.pieces.items():
        if piece not in where:
            lost["absent"].append(index)
        elif where[piece] != index:
            lost["moved"].append(index)
        elif index in silenced:
            lost["not produced"].append(index)
    total = sum(map(len, lost.values()))
    summary = f"{share(total, len(base.pieces))} pieces of the base"
    if total:
        summary += ": " + ", ".join(f"{len(ids):,} {reason}" for reason, ids in lost.items() if ids)
    if dead is None or base_dead is None:
        summary += "; whether each is still produced is not checked: that takes two SentencePiece models"
    examples = [f"{_moves(index, base.pieces[index], where)}{reason}" for reason, ids in lost.items() for index in ids]
    return judged("lost base pieces", total > 0, summary, examples, {"ids": lost})


def _moves(index: int, piece: str, where: Mapping[str, int]) -> str:
    return f"{index} {piece!r} " + (f"-> {where[piece]} " if where.get(piece, index) != index else "")
