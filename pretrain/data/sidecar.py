"""PREFIX.json, in which tools.preprocess_data notes how a corpus was made: its size, and by which tokenizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError
from pretrain.data.config import DataConfig
from pretrain.data.corpora import Corpus, parse_data_path
from tokenizer.formats.load import read_tokenizer
from tokenizer.formats.record import TokenizerRecord, read_record, record_of

_LONGEST = 64 << 10
_KEYS = {
    "documents", "tokens", "max_token_id", "append_eod", "eod_token_id", "tokenizer", "tokenizer_sha256",
}  # fmt: skip


def read_sidecar(corpus: Corpus) -> dict[str, Any] | None:
    """What tools.preprocess_data noted of a corpus; None where there is no such note.

    Raises:
        RequestError: the note speaks of other data than the index.
    """
    sidecar = _read(corpus.prefix)
    documents, tokens = len(corpus.index.lengths), corpus.index.tokens
    if sidecar is not None and (sidecar["documents"], sidecar["tokens"]) != (documents, tokens):
        path = _path(corpus.prefix)
        raise RequestError(
            f"--data-path {corpus.prefix}: {path} describes {sidecar['documents']} documents of {sidecar['tokens']} "
            f"tokens, the index {documents} of {tokens}; preprocess again, or move {path} away"
        )
    return sidecar


def corpus_tokenizers(config: DataConfig) -> dict[str, TokenizerRecord | None]:
    """By prefix of every corpus: the tokenizer that made it, None where nobody noted it.

    Raises:
        RequestError: `--data-path` cannot be understood, or a note is damaged.
    """
    if not config.data_path:
        return {}
    return {prefix: _tokenizer_of(prefix) for _, prefix in parse_data_path(config.data_path)}


def check_tokenizers(config: DataConfig) -> None:
    """Raise RequestError unless all corpora that say what made them were made by `--tokenizer-model`, or by one."""
    noted = {prefix: record for prefix, record in corpus_tokenizers(config).items() if record is not None}
    name = config.tokenizer_model
    given = None if name is None else record_of(read_tokenizer("--tokenizer-model", name))
    first = next(iter(noted), None)
    for prefix, record in noted.items():
        if given is not None and (difference := record.difference(given)):
            raise RequestError(
                f"--tokenizer-model {name} is not what made {prefix} ({record}): it {difference}; "
                "give that one, or preprocess again"
            )
        assert first is not None
        if difference := noted[first].difference(record):
            raise RequestError(
                f"--data-path {prefix}: what made it ({record}) is not the tokenizer of {first} ({noted[first]}): it "
                f"{difference}; preprocess one of them again"
            )


def _tokenizer_of(prefix: str) -> TokenizerRecord | None:
    sidecar = _read(prefix)
    if sidecar is None:
        return None
    prepend_bos = sidecar.get("prepend_bos")
    if "tokenizer_record" not in sidecar:  # of an older version
        size, eos = sidecar.get("vocab_size", 1 + sidecar["max_token_id"]), sidecar["eod_token_id"]
        plain = {"name": sidecar["tokenizer"], "kind": "of a kind not noted", "vocab_size": size, "eos_token_id": eos}
        plain["sha256"] = sidecar["tokenizer_sha256"]
    else:
        plain = sidecar["tokenizer_record"]
    try:
        return dataclasses.replace(read_record(plain), prepend_bos=prepend_bos)
    except ValueError as error:
        raise RequestError(
            f"--data-path {prefix}: {_path(prefix)} does not say well which tokenizer made it ({error}); preprocess "
            "again, or move it away"
        ) from None


def _read(prefix: str) -> dict[str, Any] | None:
    """Another tool's PREFIX.json, perhaps the raw text itself, is not taken for a note."""
    path = _path(prefix)
    if not path.is_file() or path.stat().st_size > _LONGEST:
        return None
    try:
        sidecar = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return sidecar if isinstance(sidecar, dict) and sidecar.keys() >= _KEYS else None


def _path(prefix: str) -> Path:
    return Path(prefix + ".json")
