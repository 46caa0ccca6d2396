"""How long texts become with several tokenizers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import Tokenizer
from tokenizer.text.characters import chinese_runs
from tokenizer.text.documents import Tally, progress_bar, read_lines

LINES, RUNS = "whole lines", "runs of Chinese"
TOTAL = "total"


@dataclass
class _Count:
    """A text's size, and its tokens for each tokenizer in their order."""

    characters: int
    bytes: int
    tokens: list[int]
    byte_tokens: list[int]
    unknown: list[int]


def compare(
    tokenizers: Sequence[Tokenizer],
    inputs: Sequence[Path],
    key: str,
    quiet: bool = False,
    tally: Tally | None = None,
) -> list[dict[str, Any]]:
    """Encode texts with every tokenizer, as whole lines and as runs of Han and CJK punctuation alone.

    A run is encoded on its own, so it has a dummy prefix where its tokenizer adds one to a text.

    Args:
        tokenizers: the first is what the others are measured against.
        inputs: texts, as `read_documents` takes them; cut into lines.
        key: of the text in a JSON line.
        quiet: no progress bar.
        tally: counts what was read.

    Returns:
        A record for each part (`LINES`, `RUNS`), input (and `TOTAL`, where there are several) and tokenizer, in this
        order. `byte_share` and `unknown_share` are of the tokens, `relative` is to the tokens of the first tokenizer;
        a ratio to nothing is None.

    Raises:
        TokenizerError: something is there twice, an input cannot be read, or all of them are empty.
    """
    _refuse_twice("--tokenizer", [tokenizer.path for tokenizer in tokenizers])
    _refuse_twice("--input", inputs)
    counts: list[dict[str, _Count]] = []
    with progress_bar("--input", inputs, quiet) as bar:
        for path in inputs:
            counts.append({part: _empty(tokenizers) for part in (LINES, RUNS)})
            for line in read_lines([path], key, bar.update, tally=tally):
                _add(counts[-1][LINES], line, tokenizers)
                for run in chinese_runs(line):
                    _add(counts[-1][RUNS], run, tokenizers)
    if not any(count[LINES].characters for count in counts):
        raise TokenizerError("--input holds no text")
    names = [str(path) for path in inputs]
    if len(inputs) > 1:
        names.append(TOTAL)
        counts.append({part: _sum([count[part] for count in counts]) for part in (LINES, RUNS)})
    return [
        {"part": part, "input": name, **record}
        for part in (LINES, RUNS)
        for name, count in zip(names, counts, strict=True)
        for record in _records(count[part], tokenizers)
    ]


def _refuse_twice(flag: str, paths: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise TokenizerError(f"{flag} {path} is given twice")
        seen.add(path.resolve())


def _empty(tokenizers: Sequence[Tokenizer]) -> _Count:
    none = [0] * len(tokenizers)
    return _Count(0, 0, none[:], none[:], none[:])


def _add(count: _Count, text: str, tokenizers: Sequence[Tokenizer]) -> None:
    count.characters += len(text)
    count.bytes += len(text.encode())
    for number, tokenizer in enumerate(tokenizers):
        ids = tokenizer.encode(text)
        count.tokens[number] += len(ids)
        count.byte_tokens[number] += sum(index in tokenizer.byte_ids for index in ids)
        count.unknown[number] += ids.count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0


def _sum(counts: Sequence[_Count]) -> _Count:
    return _Count(
        sum(count.characters for count in counts),
        sum(count.bytes for count in counts),
        _columns([count.tokens for count in counts]),
        _columns([count.byte_tokens for count in counts]),
        _columns([count.unknown for count in counts]),
    )


def _columns(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _records(count: _Count, tokenizers: Sequence[Tokenizer]) -> list[dict[str, Any]]:
    return [
        {
            "tokenizer": str(tokenizer.path),
            "vocabulary": tokenizer.vocab_size,
            "characters": count.characters,
            "bytes": count.bytes,
            "tokens": tokens,
            "byte_tokens": byte_tokens,
            "unknown_tokens": unknown,
            "characters_per_token": _ratio(count.characters, tokens),
            "bytes_per_token": _ratio(count.bytes, tokens),
            "byte_share": _ratio(byte_tokens, tokens),
            "unknown_share": _ratio(unknown, tokens),
            "relative": _ratio(tokens, count.tokens[0]),
        }
        for tokenizer, tokens, byte_tokens, unknown in zip(
            tokenizers, count.tokens, count.byte_tokens, count.unknown, strict=True
        )
    ]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
