"""Which tokenizer a model has on its way: found beside its weights, noted in its checkpoint, or given by a flag."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError
from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import TokenizerFile
from tokenizer.formats.load import open_tokenizer, read_tokenizer
from tokenizer.formats.record import TokenizerRecord, record_of
from tools.conversion.source import CONFIG, GENERATION, Source

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GROW = "let the model grow with --embedding-init METHOD --base-tokenizer OLD"


def detect_tokenizer(source: Source, asked: bool) -> Source:
    """`source` with the record of the tokenizer beside its weights, if it has none yet; says what was found.

    asked: a flag gives the tokenizer, so that it is no matter if none is found.
    """
    if source.record is not None or source.tokenizer is None:
        return source
    try:
        record = record_of(read_tokenizer("--input", source.tokenizer))
    except TokenizerError as error:
        if not asked:
            print(f"which tokenizer the model was trained with is not known: {error}; give it with --tokenizer")
        return source
    print(f"the tokenizer beside the weights is taken for the model's: {record}")
    for line in _contradictions(record, source):
        print(f"note: {line}")
    return dataclasses.replace(source, record=record)


def _contradictions(record: TokenizerRecord, source: Source) -> Iterator[str]:
    """Where the files of one folder disagree about its tokens."""
    if record.vocab_size > source.model.vocab_size:
        yield (
            f"{record.name} has {record.vocab_size} pieces, the model {source.model.vocab_size} rows: ids from "
            f"{source.model.vocab_size} on have none"
        )
    ids = token_ids(record)
    for file in (CONFIG, GENERATION):
        content = (source.hugging_face or {}).get(file, {})
        for name in TOKEN_IDS:
            stated, own = content.get(name), ids[name]
            if stated is not None and own is not None and not _contains(stated, own):
                yield f"{file} has {name} {stated}, its tokenizer {own}: an export after training has the tokenizer's"


def read_given(
    path: Path, source: Source, changed: bool, base: Path | None = None, where: str = "--input"
) -> TokenizerRecord:
    """The record of the tokenizer that `--tokenizer` gives a model.

    Args:
        source: as it was read; `record` says what it was trained with.
        changed: --change-tokenizer is given.
        base: the tokenizer from which the model grows to this one.

    Raises:
        RequestError: it, or `base`, is not the model's.
        TokenizerError: one of them cannot be read.
    """
    tokenizer = open_tokenizer("--tokenizer", path)
    record, before = record_of(tokenizer), source.record
    if base is not None:
        _check_same(before, record_of(read_tokenizer("--base-tokenizer", base)), f"--base-tokenizer {base}", where, "")
    else:
        _check_size(tokenizer, path, source)
        remedy = f"; {_GROW}, or name it the model's on purpose with --change-tokenizer"
        if not changed:
            _check_same(before, record, f"--tokenizer {path}", where, remedy)
        elif before is not None and before.difference(record) is None:
            raise RequestError(
                f"--change-tokenizer: --tokenizer {path} is the tokenizer of {where} already; leave it out"
            )
    if before is None:
        return record
    return dataclasses.replace(
        record, prepend_bos=before.prepend_bos, eod_token_id=None if changed else before.eod_token_id
    )


def _check_same(before: TokenizerRecord | None, record: TokenizerRecord, named: str, where: str, remedy: str) -> None:
    difference = None if before is None else before.difference(record)
    if difference is not None:
        raise RequestError(
            f"{named} is not the tokenizer that {where} was trained with ({before}): it {difference}; give that one"
            f"{remedy}"
        )


def _check_size(tokenizer: TokenizerFile, path: Path, source: Source) -> None:
    """Raise RequestError unless a model has as many rows as its tokenizer has pieces.

    One that is known to be the model's may leave rows spare, as may Hugging Face's (Qwen's, say).
    """
    rows, pieces = source.model.vocab_size, tokenizer.vocab_size
    came_so = (source.hugging_face or {}).get(CONFIG, {}).get("vocab_size") == rows
    if pieces != rows and not ((came_so or source.record is not None) and pieces < rows):
        raise RequestError(
            f"--tokenizer {path} has {pieces} pieces, the model a vocabulary of {rows}: give the model's own, or "
            f"{_GROW}"
        )


def token_ids(record: TokenizerRecord | None) -> dict[str, Any]:
    """config.json's ids of special tokens; None where the tokenizer has none, or is not known.

    A model whose documents ended with another token than the tokenizer's end of sentence ends at both.
    """
    if record is None:
        return dict.fromkeys(TOKEN_IDS)
    ends = [index for index in (record.eos_token_id, record.eod_token_id) if index is not None]
    eos = None if not ends else ends[0] if len(ends) == 1 else ends
    return dict(zip(TOKEN_IDS, (record.bos_token_id, eos, record.pad_token_id), strict=True))


def with_token_ids(content: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """What config.json said, with other ids where it contradicts them.

    A model may end at several tokens, or pad with one that its tokenizer does not know: that stays.
    """
    content = dict(content)
    for name, index in ids.items():
        stated = content.get(name)
        if name not in content or (index is not None and not (isinstance(stated, list) and _contains(stated, index))):
            content[name] = index
    return content


def _contains(stated: Any, index: Any) -> bool:
    """Whether one or several ids are among others."""
    several, wanted = (value if isinstance(value, list) else [value] for value in (stated, index))
    return set(wanted) <= set(several)
