"""One place that finds, reads and opens a tokenizer: a `.model`, a `tokenizer.json`, or a directory with one.

sentencepiece and tokenizers are imported where they are used: training asks only for a vocabulary's size.
"""

import array
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import Tokenizer, TokenizerFile, digest
from tokenizer.formats.tokenizer_json import is_json, open_json, read_json

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_NAMES = ("tokenizer.model", "tokenizer.json")


def read_tokenizer(flag: str, name: str | Path) -> TokenizerFile:
    """Read what a tokenizer's file says of itself.

    Args:
        flag: that named it, for messages.
        name: a SentencePiece `.model`, a `tokenizer.json`, or a directory with one (the `.model` first).

    Raises:
        TokenizerError: it is missing, or neither of these.
    """
    path = find(flag, name)
    content = read_bytes(flag, path)
    sha256 = hashlib.sha256(content).hexdigest()
    if is_json(path, content):
        return read_json(flag, path, content, sha256)
    return _facts(path, sha256, content, _processor(flag, path, content))


def open_tokenizer(flag: str, name: str | Path) -> Tokenizer:
    """Open a tokenizer to encode and decode; arguments and errors as `read_tokenizer`.

    Raises:
        TokenizerError: also where a tokenizer.json is given and the package tokenizers is not installed.
    """
    path = find(flag, name)
    content = read_bytes(flag, path)
    sha256 = hashlib.sha256(content).hexdigest()
    if is_json(path, content):
        return open_json(flag, path, content, sha256)
    model = _processor(flag, path, content)
    facts = _facts(path, sha256, content, model)
    return Tokenizer(**vars(facts), encode=model.encode, decode=model.decode)


def find(flag: str, name: str | Path) -> Path:
    """Find the file of a tokenizer: `name` itself, or within the directory `name`.

    Raises:
        TokenizerError: the directory has none.
    """
    path = Path(name)
    if not path.is_dir():
        return path
    found = next((path / file for file in _NAMES if (path / file).is_file()), None)
    if found is None:
        raise TokenizerError(f"{flag} {name}: no {' or '.join(_NAMES)} in this directory")
    return found


def read_bytes(flag: str, path: Path) -> bytes:
    """Read the content of a file.

    Raises:
        TokenizerError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{flag} {path}: cannot read it: {error.strerror}") from None


def _processor(flag: str, path: Path, content: bytes) -> "SentencePieceProcessor":
    import sentencepiece

    problem = "is not a SentencePiece model, or not the whole of one"
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        if model.vocab_size() > 0:
            return model
    except Exception as error:  # the library raises bare RuntimeErrors that name its own source lines
        if "already defined" in str(error):
            problem = f"has a piece twice, which sentencepiece refuses ({str(error).removeprefix('INTERNAL: ')})"
    raise TokenizerError(f"{flag} {path} {problem}")


def _facts(path: Path, sha256: str, content: bytes, model: "SentencePieceProcessor") -> TokenizerFile:
    ids = list(range(model.vocab_size()))
    special = (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id())
    return TokenizerFile(
        path,
        sha256,
        "SentencePiece",
        len(ids),
        dict(zip(ids, model.id_to_piece(ids), strict=True)),
        frozenset(index for index, byte in zip(ids, model.is_byte(ids), strict=True) if byte),
        *(index if index >= 0 else None for index in special),
        rules_sha256=_rules(content),
    )


def _rules(content: bytes) -> str:
    """Digest of what a SentencePiece model says of its pieces and of normalization, and not of its training."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString(content)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    settings = (trainer.model_type, trainer.byte_fallback, trainer.treat_whitespace_as_suffix)
    spaces = (normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces)
    scores = array.array("f", (piece.score for piece in proto.pieces)).tobytes()
    types = bytes(piece.type for piece in proto.pieces)
    return digest(repr((*map(int, settings), *map(int, spaces))), normalizer.precompiled_charsmap, scores, types)
