"""A comparison as text and Markdown."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizer.compare import LINES, RUNS
from tokenizer.tables import markdown_table, text_table

_Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

_HEAD = (
    "input", "tokenizer", "vocabulary", "tokens", "chars/token", "bytes/token", "byte tokens", "unknown", "vs first",
)  # fmt: skip


def as_text(records: Sequence[dict[str, Any]]) -> str:
    """The tables for the terminal."""
    return "\n\n".join(f"{part}\n{_table(records, part, text_table)}" for part in (LINES, RUNS))


def as_markdown(records: Sequence[dict[str, Any]]) -> str:
    """The tables as a page."""
    tables = [f"## {part.capitalize()}\n\n{_table(records, part, markdown_table)}" for part in (LINES, RUNS)]
    return "\n\n".join(["# Tokenizers compared", *tables]) + "\n"


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """For each path as much of its end as tells it from the others; tokenizer.model with its directory."""
    depth = 1
    while len({_tail(path, depth) for path in paths}) < len(set(paths)):
        depth += 1
    return {path: _tail(path, depth) for path in paths}


def _tail(path: str, depth: int) -> str:
    parts = Path(path).parts
    return str(Path(*parts[-depth - (Path(path).stem == "tokenizer") :]))


def _table(records: Sequence[dict[str, Any]], part: str, draw: _Table) -> str:
    inputs = short_names([record["input"] for record in records])
    tokenizers = short_names([record["tokenizer"] for record in records])
    rows = [
        (
            inputs[record["input"]],
            tokenizers[record["tokenizer"]],
            f"{record['vocabulary']:,}",
            f"{record['tokens']:,}",
            _number(record["characters_per_token"], ".3f"),
            _number(record["bytes_per_token"], ".3f"),
            _number(record["byte_share"], ".1%"),
            _number(record["unknown_share"], ".1%"),
            _number(record["relative"], ".1%"),
        )
        for record in records
        if record["part"] == part
    ]
    return draw(_HEAD, rows)


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
