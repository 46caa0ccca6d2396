"""Hugging Face's tokenizer.json: what it says of itself, and its use."""

import functools
import json
import operator
import re
from pathlib import Path
from typing import Any

from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import Tokenizer, TokenizerFile, digest

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def is_json(path: Path, content: bytes) -> bool:
    """Tell whether this is meant as a tokenizer.json."""
    return path.suffix == ".json" or content.startswith(b"{")


def why_not_a_model(content: bytes) -> str:
    """Say why a tokenizer.json cannot stand for the pieces of a SentencePiece model, and what would do."""
    try:
        kind = _kind(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is neither a SentencePiece model nor a tokenizer.json"
    if kind == "byte-level BPE":
        return (
            "is a tokenizer.json with byte-level BPE, as GPT-2's: its pieces are bytes, ordered by a list of merges, "
            "and have neither characters nor the scores that a merge needs; give a SentencePiece model"
        )
    return (
        f"is a tokenizer.json ({kind}), which lacks what a SentencePiece model says of its pieces (types, scores, "
        "normalization); give the tokenizer.model that it was made from"
    )


def read_json(flag: str, path: Path, content: bytes, sha256: str) -> TokenizerFile:
    """Read a tokenizer.json, and the names of special tokens in the tokenizer_config.json beside it.

    Those that it does not name may stand in a special_tokens_map.json. Without both files the names are `<s>` and
    `</s>`, and there is no padding.

    Raises:
        TokenizerError: it is something else, or the configuration is no JSON object.
    """
    parsed = parse_json(flag, path, content)
    kind, model, ids = _kind(parsed), parsed["model"], dict(entries(parsed))
    unk = model.get("unk_id") if isinstance(model["vocab"], list) else ids.get(model.get("unk_token"))
    pieces = {index: piece for piece, index in ids.items()}
    beside = [path.with_name(name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    found = [special_names(read_object(flag, settings)) for settings in beside if settings.is_file()]
    names = functools.reduce(operator.or_, found) if found else {"bos_token": "<s>", "eos_token": "</s>"}
    return TokenizerFile(
        path,
        sha256,
        kind,
        1 + max(pieces),
        pieces,
        _byte_ids(kind, model, pieces),
        unk,
        *(ids.get(names.get(name, "")) for name in ("bos_token", "eos_token", "pad_token")),
        rules_sha256=_rules(parsed),
    )


def open_json(flag: str, path: Path, content: bytes, sha256: str) -> Tokenizer:
    """Open a tokenizer.json with the package tokenizers.

    Raises:
        TokenizerError: as `read_json`; the package is missing, or refuses the file.
    """
    facts = read_json(flag, path, content, sha256)
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError(f"{flag} {path}: a tokenizer.json needs `pip install tokenizers`") from None
    try:
        model = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:
        raise TokenizerError(f"{flag} {path} is not a Hugging Face tokenizer.json: {error}") from None
    model.encode_special_tokens = True  # a "</s>" inside a document is text, not an end of document
    model.no_truncation()  # such a setting in the file is for sentences; documents are kept whole
    model.no_padding()
    return Tokenizer(
        **vars(facts),
        encode=lambda text: model.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: model.decode(ids, skip_special_tokens=False),
    )


def parse_json(flag: str, path: Path, content: bytes) -> dict[str, Any]:
    """Parse the content of a tokenizer.json, of which `entries` can be taken.

    Raises:
        TokenizerError: it is something else.
    """
    try:
        parsed = json.loads(content)
        ids = [index for _, index in entries(parsed)]
        if not ids or not all(isinstance(index, int) and index >= 0 for index in ids) or not _kind(parsed):
            raise ValueError("no ids")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TokenizerError(f"{flag} {path} is not a Hugging Face tokenizer.json with a vocabulary") from None
    return parsed


def entries(parsed: dict[str, Any]) -> list[tuple[str, int]]:
    """List piece and id of the vocabulary of a parsed tokenizer.json, then those that only its added tokens have."""
    vocabulary = parsed["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score], in the order of the ids
        listed = [(piece, index) for index, (piece, _) in enumerate(vocabulary)]
    else:
        listed = list(vocabulary.items())
    in_vocabulary = set(listed)
    added = [(token["content"], token["id"]) for token in parsed.get("added_tokens") or ()]
    return listed + [entry for entry in added if entry not in in_vocabulary]


def special_names(settings: dict[str, Any]) -> dict[str, str]:
    """Find the special tokens that a tokenizer_config.json or special_tokens_map.json names, such as `eos_token`."""
    given = {name: settings.get(name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    names = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return {name: token for name, token in names.items() if isinstance(token, str)}


def read_object(flag: str, path: Path) -> dict[str, Any]:
    """Read a JSON object from a file beside a tokenizer.

    Raises:
        TokenizerError: it is something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise TokenizerError(f"{flag} {path.parent}: {path} is not a JSON object")
    return value


def bos_post_processor(piece: str | None, index: int | None) -> dict[str, Any]:
    """Make a post-processor that puts a token before every text, or nothing."""
    first, second = ([{"SpecialToken": {"id": piece, "type_id": kind}}] if piece is not None else [] for kind in (0, 1))
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {} if piece is None else {piece: {"id": piece, "ids": [index], "tokens": [piece]}},
    }


def with_bos(parsed: dict[str, Any], piece: str, index: int, wanted: bool) -> dict[str, Any]:
    """Give a tokenizer.json whose texts begin with a token, or do not; what else is done to ids stays."""
    own = parsed.get("post_processor")
    steps = [] if own is None else own["processors"] if own["type"] == "Sequence" else [own]
    adding = [step for step in steps if "special_tokens" in step or "cls" in step]
    if any(piece in json.dumps(step, ensure_ascii=False) for step in adding) == wanted:
        return parsed
    kept = [step for step in steps if step not in adding]
    if wanted:
        kept.append(bos_post_processor(piece, index))
    made = {"type": "Sequence", "processors": kept} if len(kept) > 1 else kept[0] if kept else None
    return parsed | {"post_processor": made}


def _kind(parsed: dict[str, Any]) -> str:
    model = parsed["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "tokenizer.json")
    stages = json.dumps([parsed.get("pre_tokenizer"), parsed.get("decoder")])
    return "byte-level BPE" if kind == "BPE" and '"type": "ByteLevel"' in stages else kind


def _rules(parsed: dict[str, Any]) -> str:
    """Digest of merges or scores and of what is done to text before; not of what is added around it or left out."""
    model = parsed["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or ()]
    scores = [score for _, score in model["vocab"]] if isinstance(model["vocab"], list) else []
    switches = [bool(model.get(name)) for name in ("byte_fallback", "ignore_merges", "fuse_unk")]
    before = [parsed.get("normalizer"), parsed.get("pre_tokenizer")]
    return digest(json.dumps([merges, scores, switches, before], sort_keys=True))


def _byte_ids(kind: str, model: dict[str, Any], pieces: dict[int, str]) -> frozenset[int]:
    if kind == "byte-level BPE":
        table = _byte_level_table()
        return frozenset(index for index, piece in pieces.items() if not _whole_characters(piece, table))
    if not model.get("byte_fallback"):
        return frozenset()
    return frozenset(index for index, piece in pieces.items() if _BYTE.fullmatch(piece))


def _whole_characters(piece: str, table: dict[str, int]) -> bool:
    try:
        bytes(table[letter] for letter in piece).decode()
    except KeyError:  # an added token is written as it is
        return True
    except UnicodeDecodeError:
        return False
    return True


def _byte_level_table() -> dict[str, int]:
    """Letter to byte: GPT-2 (its encoder.py) writes printable Latin-1 as it is, other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}
