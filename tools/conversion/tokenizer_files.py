"""The tokenizer that goes with converted weights: its files beside them, its ids in config.json."""

import shutil
from pathlib import Path

from megatron_ext.errors import RequestError
from tokenizer.errors import TokenizerError
from tokenizer.interface import TokenizerFile
from tokenizer.load import read_tokenizer

_NAMES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read(path: Path, vocab_size: int) -> TokenizerFile:
    """What `--tokenizer` names; RequestError unless it has as many pieces as the model has rows."""
    try:
        tokenizer = read_tokenizer("--tokenizer", path)
    except TokenizerError as error:
        raise RequestError(str(error)) from error
    if tokenizer.vocab_size != vocab_size:
        raise RequestError(
            f"--tokenizer {path} has {tokenizer.vocab_size} pieces, the model a vocabulary of {vocab_size}: give the "
            "model's own, or let the model grow with --embedding-init METHOD --base-tokenizer OLD"
        )
    return tokenizer


def token_ids(tokenizer: TokenizerFile) -> dict[str, int | None]:
    """config.json's ids of special tokens; None where the tokenizer has none."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def copy(source: Path, folder: Path) -> None:
    """Put a tokenizer beside the weights: a folder's tokenizer files, or one file under the name it must have."""
    if source.is_file():
        shutil.copyfile(source, folder / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model"))
        return
    for name in _NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
