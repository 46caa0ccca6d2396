"""What a merge did: for programs, as a page, and as a line."""

from collections.abc import Callable, Iterable
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.formats.huggingface import why_no_fast_tokenizer
from tokenizer.formats.sentencepiece_model import piece_encoder, unreachable
from tokenizer.merge.chinese_llama import Merged, merge_chinese_llama
from tokenizer.merge.corpus import batches_of_runs
from tokenizer.output import markdown_table

_EXAMPLES = 20


def as_json(
    merged: Merged, base: ModelProto, extra: ModelProto, corpus: Callable[[], Iterable[str]] | None = None
) -> dict[str, Any]:
    """Make the report for programs, with all pieces of every list.

    Args:
        merged: of `base` and `extra`.
        base, extra: the two models.
        corpus: gives the lines of a text to measure on.
    """
    dead = {merged.proto.pieces[index].piece for index in unreachable(merged.proto)}
    already = {base.pieces[index].piece for index in unreachable(base)}
    return {
        "mode": merged.mode,
        "pieces": len(merged.proto.pieces),
        "base_pieces": merged.base,
        "extra_pieces": merged.extra,
        "new_pieces": merged.added,
        "added": merged.groups,
        "dropped": merged.dropped,
        "unreachable_new_pieces": [p.piece for p in merged.proto.pieces[merged.base :] if p.piece in dead],
        "lost_base_pieces": [piece.piece for piece in base.pieces if piece.piece in dead - already],
        "no_tokenizer_json_because": why_no_fast_tokenizer(merged.proto),
        "corpus": _measure(merged, base, extra, corpus()) if corpus else None,
    }


def as_markdown(record: dict[str, Any]) -> str:
    """Format the report as a page, from what `as_json` gives."""
    rows = [
        ("pieces", f"{record['pieces']:,}"),
        ("of the base", f"{record['base_pieces']:,}"),
        ("new", f"{record['new_pieces']:,}"),
        ("new pieces that no text can produce", f"{len(record['unreachable_new_pieces']):,}"),
        ("pieces of the base that no text produces any more", f"{len(record['lost_base_pieces']):,}"),
        ("tokenizer.json", record["no_tokenizer_json_because"] or "written; gives the same ids"),
    ]
    parts = [f"# Merge, mode {record['mode']}", markdown_table(("", ""), rows)]
    if record["corpus"]:
        tokens = record["corpus"]["tokens"]
        counted = [(name, f"{count:,}", f"{count / tokens['base']:.3f}") for name, count in tokens.items()]
        parts.append(f"## Chinese runs of the corpus: {record['corpus']['characters']:,} characters")
        parts.append(markdown_table(("vocabulary", "tokens", "of the base's"), counted))
    for title, lists in (("Added", record["added"]), ("Not taken from the extra model", record["dropped"])):
        parts += _lists(title, lists)
    parts += _lists("Faults", {"new, but unreachable": record["unreachable_new_pieces"],
                               "of the base, and lost": record["lost_base_pieces"]})  # fmt: skip
    return "\n\n".join(parts) + "\n"


def as_line(record: dict[str, Any]) -> str:
    """Format the report in one line."""
    not_taken = record["extra_pieces"] - len(record["added"]["pieces of the extra model"])
    return (
        f"{record['pieces']:,} pieces = {record['base_pieces']:,} of the base + {record['new_pieces']:,} new "
        f"({not_taken:,} of the extra model's {record['extra_pieces']:,} not taken or there already; "
        f"{len(record['unreachable_new_pieces']):,} new ones unreachable, "
        f"{len(record['lost_base_pieces']):,} of the base lost)"
    )


def _lists(title: str, lists: dict[str, list[str]]) -> list[str]:
    rows = [
        (name, f"{len(pieces):,}", " ".join(pieces[:_EXAMPLES]) + (" …" if len(pieces) > _EXAMPLES else ""))
        for name, pieces in lists.items()
        if pieces
    ]
    return [f"## {title}", markdown_table(("", "pieces", "examples"), rows)] if rows else []


def _measure(merged: Merged, base: ModelProto, extra: ModelProto, lines: Iterable[str]) -> dict[str, Any]:
    models = {"base": base, "chinese-llama": merge_chinese_llama(base, extra).proto, merged.mode: merged.proto}
    encoders = {name: piece_encoder(proto) for name, proto in models.items()}
    characters, tokens = 0, dict.fromkeys(models, 0)
    for runs in batches_of_runs(lines):
        characters += sum(map(len, runs))
        for name, encode in encoders.items():
            tokens[name] += sum(map(len, encode(runs)))
    return {"characters": characters, "tokens": tokens}
