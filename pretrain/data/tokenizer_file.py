"""What training must know of a tokenizer: its size, its end-of-document id, and whether it is the data's own."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError
from pretrain.data.config import DataConfig


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer as found on disk.

    Attributes:
        path: the file itself, also when a directory was given.
        vocab_size: one more than the largest id.
        eos_id: end-of-sentence id, None when it has none.
        sha256: of the file, in hex.
    """

    path: Path
    vocab_size: int
    eos_id: int | None
    sha256: str


def read_tokenizer(name: str) -> TokenizerFile:
    """Read a SentencePiece `.model`, a `tokenizer.json`, or a directory with one (the `.model` first).

    Raises:
        RequestError: it is missing or neither of these.
    """
    path = Path(name)
    if path.is_dir():
        found = [path / file for file in ("tokenizer.model", "tokenizer.json") if (path / file).is_file()]
        if not found:
            raise RequestError(f"--tokenizer-model {name}: no tokenizer.model or tokenizer.json in this directory")
        path = found[0]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"--tokenizer-model {name}: cannot read it: {error.strerror}") from None
    size, eos = _read_json(path, content) if path.suffix == ".json" else _read_sentencepiece(path, content)
    return TokenizerFile(path, size, eos, hashlib.sha256(content).hexdigest())


def eod_token(config: DataConfig) -> int:
    """The id that ends a document, for the flags that look for it.

    Raises:
        RequestError: neither `--eod-token-id` nor the tokenizer gives one.
    """
    if config.eod_token_id is not None:
        return config.eod_token_id
    flags = ", ".join(config.eod_flags)
    if config.tokenizer_model is None:
        raise RequestError(f"{flags}: which token ends a document? give --tokenizer-model or --eod-token-id")
    eos = read_tokenizer(config.tokenizer_model).eos_id
    if eos is None:
        raise RequestError(
            f"{flags}: --tokenizer-model {config.tokenizer_model} has no end-of-sentence id; give --eod-token-id"
        )
    return eos


def _read_sentencepiece(path: Path, content: bytes) -> tuple[int, int | None]:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        size, eos = model.vocab_size(), model.eos_id()
    except Exception:  # the library raises bare RuntimeErrors that name its own source lines
        size, eos = 0, -1
    if size == 0:
        raise RequestError(f"--tokenizer-model {path} is not a SentencePiece model")
    return size, eos if eos >= 0 else None


def _read_json(path: Path, content: bytes) -> tuple[int, int | None]:
    try:
        tokenizer = json.loads(content)
        ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        size = 1 + max(ids.values())
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"--tokenizer-model {path} is not a Hugging Face tokenizer.json with a vocabulary") from None
    settings = path.with_name("tokenizer_config.json")
    eos: Any = "</s>"
    if settings.is_file():
        try:
            eos = json.loads(settings.read_bytes()).get("eos_token")
        except (ValueError, AttributeError):
            raise RequestError(f"--tokenizer-model {path}: {settings} is not a JSON object") from None
    return size, ids.get(eos["content"] if isinstance(eos, dict) else eos)
