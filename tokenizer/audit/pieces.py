"""Checks of a vocabulary that need no text: its pieces, and its special tokens in every file beside it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.audit.report import Finding, judged, share
from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import Tokenizer, TokenizerFile
from tokenizer.formats.sentencepiece_model import unreachable
from tokenizer.formats.tokenizer_json import read_object, special_names

# Among them is each byte that UTF-8 can have, at each place that it can have.
_PROBES = [chr(code) for code in (*range(0x800), *range(0x800, 0x110000, 0x3F1)) if not 0xD800 <= code < 0xE000]


def check_duplicates(entries: Iterable[tuple[str, int]]) -> Finding:
    """Check whether a piece has several ids, or an id several pieces.

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
    """Check whether any character can be encoded: some three thousand that together have every byte of UTF-8."""

    def is_lost(letter: str) -> bool:
        ids = tokenizer.encode(letter)
        return not ids or tokenizer.unk_id in ids

    lost = [f"U+{ord(letter):04X}" for letter in _PROBES if is_lost(letter)]
    summary = "any character can be encoded, if need be as bytes"
    if lost:
        summary = f"{share(len(lost), len(_PROBES))} characters tried become <unk> or vanish: no full byte fallback"
    return judged("any character", bool(lost), summary, lost, {"lost": lost})


def dead_pieces(proto: ModelProto) -> frozenset[int]:
    """Find the ids of pieces that no text is encoded to; control pieces, which are meant so, among them."""
    silent = {index for index, piece in enumerate(proto.pieces) if piece.type in (piece.CONTROL, piece.UNUSED)}
    return frozenset(silent.union(unreachable(proto)))


def check_dead(proto: ModelProto, dead: frozenset[int], base: TokenizerFile | None) -> Finding:
    """Find normal and unused pieces that no text is encoded to; those that the base lacks count as new.

    Args:
        proto: the model.
        dead: its `dead_pieces`.
        base: what the model extends.
    """
    normal = [index for index, piece in enumerate(proto.pieces) if piece.type in (piece.NORMAL, piece.UNUSED)]
    ids = [index for index in normal if index in dead]
    summary = f"{share(len(ids), len(normal))} normal pieces are produced by no text"
    base_pieces = set(base.pieces.values()) if base else set()
    new = [index for index in ids if proto.pieces[index].piece not in base_pieces]
    if ids and base:
        summary += f"; {len(new):,} of them are new, {len(ids) - len(new):,} the base has too"
    examples = [f"{index} {proto.pieces[index].piece!r}" for index in new or ids]
    return judged("dead pieces", bool(ids), summary, examples, {"ids": ids, "new_ids": new})


def check_lost(
    tokenizer: TokenizerFile, base: TokenizerFile, dead: frozenset[int] | None, base_dead: frozenset[int] | None
) -> Finding:
    """Find pieces of the base that are absent, have another id, or are no longer produced though the base does.

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


_ROLES = ("unk", "bos", "eos", "pad")
_NAMING = ("tokenizer_config.json", "special_tokens_map.json")
_MODEL = ("config.json", "generation_config.json")


def check_special_tokens(flag: str, tokenizer: Tokenizer) -> Finding:
    """Check that the tokenizer and the files beside it mean the same ids, and text cannot produce one.

    Raises:
        TokenizerError: one of the files is not a JSON object.
    """
    files = {file: _read_beside(flag, tokenizer, file) for file in (*_NAMING, *_MODEL, "added_tokens.json")}
    ids = {piece: index for index, piece in tokenizer.pieces.items()}
    added = _added_tokens(flag, tokenizer.path, files)
    names = {file: special_names(files[file]) for file in _NAMING}
    named = [(file, role, name) for file in _NAMING for role in _ROLES if (name := names[file].get(f"{role}_token"))]
    all_ids = added | ids
    roles = _roles(tokenizer, {role: all_ids[name] for _, role, name in reversed(named) if name in all_ids})
    problems = [*_added_problems(added, ids, tokenizer.pieces), *_naming_problems(named, all_ids, roles)]
    size = max([tokenizer.vocab_size, *(index + 1 for index in added.values())])
    for file in _MODEL:
        problems += _model_problems(file, files[file], roles, size)
    if "eos" not in roles:
        problems.append("there is no eos: nothing says where a document ends")
    elif roles.get("pad") == roles["eos"]:
        problems.append(f"pad and eos are both id {roles['eos']}: a loss that leaves out padding leaves out the ends")
    for role, index in roles.items():
        piece = tokenizer.pieces.get(index)
        if role != "unk" and piece is not None and index in tokenizer.encode(piece):
            problems.append(f"the plain text {piece!r} is encoded to the {role} id {index}")
    summary = ", ".join(f"{role} {roles.get(role, 'none')}" for role in _ROLES)
    if problems:
        summary += f"; {len(problems)} {'problem' if len(problems) == 1 else 'problems'}"
    return judged("special tokens", bool(problems), summary, problems, {"ids": roles})


def _read_beside(flag: str, tokenizer: Tokenizer, file: str) -> dict[str, Any]:
    path = tokenizer.beside(file)
    return read_object(flag, path) if path else {}


def _added_tokens(flag: str, path: Path, files: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """Token to id, of added_tokens.json and of `added_tokens_decoder` in tokenizer_config.json."""
    decoder = files["tokenizer_config.json"].get("added_tokens_decoder", {})
    try:
        return {token: int(index) for token, index in files["added_tokens.json"].items()} | {
            token["content"]: int(index) for index, token in decoder.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise TokenizerError(f"{flag} {path}: the files beside it list added tokens in no known form") from None


def _roles(tokenizer: Tokenizer, named: Mapping[str, int]) -> dict[str, int]:
    """Role to id: the tokenizer's own, else as `named` beside it."""
    own = {role: getattr(tokenizer, f"{role}_id") for role in _ROLES}
    found = {role: named.get(role) if index is None else index for role, index in own.items()}
    return {role: index for role, index in found.items() if index is not None}


def _added_problems(added: Mapping[str, int], ids: Mapping[str, int], pieces: Mapping[int, str]) -> Iterator[str]:
    for token, index in added.items():
        if ids.get(token, index) != index:
            yield f"the added token {token!r} has id {index}, the vocabulary has it at {ids[token]}"
        elif pieces.get(index, token) != token:
            yield f"the added token {token!r} has id {index}, which is {pieces[index]!r} in the vocabulary"


def _naming_problems(
    named: Sequence[tuple[str, str, str]], ids: Mapping[str, int], roles: Mapping[str, int]
) -> Iterator[str]:
    for file, role, name in named:
        if name not in ids:
            yield f"{file}: {role}_token {name!r} has no id"
        elif ids[name] != roles[role]:
            yield f"{file}: {role}_token {name!r} is id {ids[name]}, elsewhere {role} is id {roles[role]}"


def _model_problems(file: str, given: Mapping[str, Any], roles: Mapping[str, int], size: int) -> Iterator[str]:
    for role, index in roles.items():
        said = given.get(f"{role}_token_id")
        if said is not None and said != -1 and index not in (said if isinstance(said, list) else [said]):
            yield f"{file}: {role}_token_id is {said}, the tokenizer's {role} is {index}"
    rows = given.get("vocab_size")
    if isinstance(rows, int) and rows < size:
        yield f"{file}: vocab_size is {rows:,}, the tokenizer's ids go up to {size - 1:,}"
