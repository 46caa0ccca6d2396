"""The tokenizer files beside converted weights: with them transformers gives the ids that the model was trained on.

Training asks sentencepiece or tokenizers for the ids of a text. transformers loads the same files in ways of its own,
by the class that tokenizer_config.json names or that belongs to the type of model, which may put together another
tokenizer of the same pieces. So several configurations are tried, and the first is taken that gives training's ids.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizer.formats.huggingface import huggingface_files
from tokenizer.formats.interface import Tokenizer
from tokenizer.formats.load import open_tokenizer
from tokenizer.formats.record import TokenizerRecord
from tokenizer.formats.sentencepiece_model import read_model
from tokenizer.formats.tokenizer_json import read_object, special_names, with_bos
from tools.conversion.proof.prove import NotEqual
from tools.conversion.proof.run_transformers import NotRunnable
from tools.conversion.proof.tokenizers import Differences, compare_tokenizers

MODEL, JSON = "tokenizer.model", "tokenizer.json"
SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_BESIDE = (
    "vocab.json",
    "merges.txt",
    SPECIAL,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# of a tokenizer_config.json: what does not say how text becomes ids
_KEPT = (
    "chat_template",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "additional_special_tokens",
    "extra_special_tokens",
)
_GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
# transformers 5 takes Qwen2Tokenizer for every Qwen2 model, and its general class for every Mistral and GLM, whatever
# class is named, unless there is an auto_map. This one leads to no code, and none is asked for.
_AS_NAMED = {"auto_map": {"AutoTokenizer": ["", None]}}


def copy(source: Path, folder: Path) -> None:
    """Put a tokenizer beside the weights as it is: a folder's files, or one file under the name it must have."""
    if source.is_file():
        shutil.copyfile(source, folder / (JSON if source.suffix == ".json" else MODEL))
        return
    for name in (MODEL, JSON, SETTINGS, *_BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write(flag: str, source: Path, record: TokenizerRecord, folder: Path, rows: int) -> str:
    """Write the files of a tokenizer into a folder with a config.json; says in a line what was found.

    Args:
        flag: that named it, for messages.
        source: file or folder of the tokenizer.
        record: says whether texts are to begin with its begin-of-sentence token; None: as is its own way.
        rows: of the model's embedding: a token that was added beyond them goes.

    Raises:
        NotEqual: transformers gives other ids with any configuration.
        TokenizerError: it cannot be read.
    """
    tokenizer = open_tokenizer(flag, source)
    if tokenizer.kind == "SentencePiece":
        configurations = _write_sentencepiece(flag, tokenizer, record, folder, rows)
    else:
        configurations = _write_json(flag, tokenizer, record, folder)
    best: tuple[dict[str, Any], Differences] | None = None
    for configuration in configurations:
        _write_object(folder / SETTINGS, configuration)
        try:
            found = compare_tokenizers(tokenizer, record, folder)
        except NotRunnable as error:
            return f"tokenizer files written; which ids transformers gives with them was not compared: {error}"
        if best is None or found.severity < best[1].severity:
            best = configuration, found
        if not found.severity:
            break
    assert best is not None
    configuration, found = best
    _write_object(folder / SETTINGS, configuration)
    if found.ids is not None:
        raise NotEqual(f"with {tokenizer.path} transformers' AutoTokenizer {found.ids}")
    return f"tokenizer files written: {found}"


def _write_sentencepiece(
    flag: str, tokenizer: Tokenizer, record: TokenizerRecord, folder: Path, rows: int
) -> Iterator[dict[str, Any]]:
    """Write a model and what transformers needs; gives what tokenizer_config.json could say."""
    own = _read(flag, tokenizer.beside(SETTINGS))
    pad = own.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    pad_piece = pad if pad in tokenizer.pieces.values() else None
    proto = read_model(flag, tokenizer.path)
    for name, content in huggingface_files(proto, pad_piece, add_bos=record.prepend_bos is not False).items():
        (folder / name).write_bytes(content)
    shutil.copyfile(tokenizer.path, folder / MODEL)
    for name in ("chat_template.jinja", "chat_template.json"):
        if (beside := tokenizer.beside(name)) is not None:
            shutil.copyfile(beside, folder / name)
    added = own.get("added_tokens_decoder") or {}
    # transformers appends them in their order, whatever their ids
    ids = itertools.takewhile(lambda index: str(index) in added, range(tokenizer.vocab_size, rows))
    later = {str(index): added[str(index)] for index in ids}
    settings = json.loads((folder / SETTINGS).read_bytes()) | {name: own[name] for name in _KEPT if name in own}
    if later:
        settings["added_tokens_decoder"] = later
    return iter((settings, settings | _AS_NAMED))


def _write_json(flag: str, tokenizer: Tokenizer, record: TokenizerRecord, folder: Path) -> Iterator[dict[str, Any]]:
    """The same for a tokenizer.json: the file itself but for the token that texts begin with, and those beside it."""
    shutil.copyfile(tokenizer.path, folder / JSON)
    if record.prepend_bos is not None and tokenizer.bos_id is not None:
        found = json.loads(tokenizer.path.read_bytes())
        wanted = with_bos(found, tokenizer.pieces[tokenizer.bos_id], tokenizer.bos_id, record.prepend_bos)
        if wanted != found:
            _write_object(folder / JSON, wanted)
    for name in _BESIDE:
        if (beside := tokenizer.beside(name)) is not None:
            shutil.copyfile(beside, folder / name)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    names = {f"{name}_token": tokenizer.pieces[index] for name, index in ids.items() if index is not None}
    own = _named(_read(flag, tokenizer.path.with_name(SETTINGS)), names)
    if (folder / SPECIAL).is_file():  # where the two disagree, it would win in transformers, and did not in training
        _write_object(folder / SPECIAL, _named(_read(flag, folder / SPECIAL), names))
    if own.get("add_bos_token") is not None and record.prepend_bos is not None:
        own["add_bos_token"] = record.prepend_bos
    if "tokenizer_class" in own:
        yield own
    yield own | _GENERAL
    yield own | _GENERAL | _AS_NAMED


def _named(settings: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Settings that name these special tokens; a name that is right already keeps its further properties."""
    right = special_names(settings)
    return settings | {name: piece for name, piece in names.items() if right.get(name) != piece}


def _read(flag: str, path: Path | None) -> dict[str, Any]:
    """The JSON object in a file that need not be there."""
    return read_object(flag, path) if path is not None and path.is_file() else {}


def _write_object(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
