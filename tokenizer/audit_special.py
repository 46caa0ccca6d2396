"""The check of special tokens: one id each, in every file of a Hugging Face directory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizer.errors import TokenizerError
from tokenizer.finding import Finding, judged
from tokenizer.interface import Tokenizer
from tokenizer.tokenizer_json import read_object, special_names

_ROLES = ("unk", "bos", "eos", "pad")
_NAMING = ("tokenizer_config.json", "special_tokens_map.json")
_MODEL = ("config.json", "generation_config.json")


def check_special_tokens(flag: str, tokenizer: Tokenizer) -> Finding:
    """Whether the tokenizer and the files beside it mean the same ids, and text cannot produce one.

    Raises:
        TokenizerError: one of the files is not a JSON object.
    """
    files = {file: _read_beside(flag, tokenizer, file) for file in (*_NAMING, *_MODEL, "added_tokens.json")}
    ids = {piece: index for index, piece in tokenizer.pieces.items()}
    added = _added_tokens(flag, tokenizer.path, files)
    names = {file: special_names(files[file]) for file in _NAMING}
    named = [(file, role, name) for file in _NAMING for role in _ROLES if (name := names[file].get(f"{role}_token"))]
    known = added | ids
    roles = _roles(tokenizer, {role: known[name] for _, role, name in reversed(named) if name in known})
    problems = [*_added_problems(added, ids, tokenizer.pieces), *_naming_problems(named, known, roles)]
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
