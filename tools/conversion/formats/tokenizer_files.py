"""The tokenizer that goes with converted weights: its files beside them, its ids in config.json."""

import shutil
from pathlib import Path

from megatron_ext.errors import RequestError
from tokenizer.errors import TokenizerError
from tokenizer.interface import TokenizerFile
from tokenizer.load import read_tokenizer
from tools.conversion.source import CONFIG, Source

_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def read(path: Path, source: Source) -> TokenizerFile:
    """What `--tokenizer` names; RequestError unless it has as many pieces as the model has rows.

    Only a model that came from Hugging Face with spare rows (Qwen's, say) may keep them.
    """
    try:
        tokenizer = read_tokenizer("--tokenizer", path)
    except TokenizerError as error:
        raise RequestError(str(error)) from error
    rows, pieces = source.model.vocab_size, tokenizer.vocab_size
    came_so = (source.hugging_face or {}).get(CONFIG, {}).get("vocab_size") == rows
    if pieces != rows and not (came_so and pieces < rows):
        raise RequestError(
            f"--tokenizer {path} has {pieces} pieces, the model a vocabulary of {rows}: give the "
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
