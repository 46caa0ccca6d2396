"""What is wrong with a tokenizer: in itself, against the one that it extends, and on text."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from tqdm import tqdm

from tokenizer.audit.pieces import (
    check_coverage,
    check_dead,
    check_duplicates,
    check_lost,
    check_special_tokens,
    dead_pieces,
)
from tokenizer.audit.report import Audit, Finding, skipped
from tokenizer.audit.text import LineCheck, TokenRate, byte_rate, changed_lines, disagreement, round_trip, unknown_rate
from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import Tokenizer
from tokenizer.formats.load import find, open_tokenizer, read_bytes
from tokenizer.formats.sentencepiece_model import read_model
from tokenizer.formats.tokenizer_json import entries, is_json, parse_json, why_not_a_model
from tokenizer.text.documents import Tally, progress_bar, read_lines

_NO_BASE = "needs the tokenizer that this one extends: give --base"


@dataclass(frozen=True)
class _Subject:
    """A tokenizer under audit.

    Attributes:
        tokenizer: to encode and decode with.
        proto: its pieces, None of a tokenizer.json.
        dead: its `dead_pieces`, None of a tokenizer.json.
        no_proto: why there are none.
    """

    tokenizer: Tokenizer
    proto: ModelProto | None
    dead: frozenset[int] | None
    no_proto: str = ""


def audit(
    name: Path,
    base: Path | None,
    inputs: Sequence[Path],
    key: str,
    quiet: bool = False,
    tally: Tally | None = None,
) -> Audit:
    """Run all checks that apply.

    Args:
        name: a SentencePiece model, a tokenizer.json, or a directory with one.
        base: what it extends, as `name`.
        inputs: texts, as `read_documents` takes them; may be none.
        key: of the text in a JSON line.
        quiet: no progress bars.
        tally: counts what was read.

    Raises:
        TokenizerError: something cannot be read, or `inputs` hold no text.
    """
    double = _duplicates("--tokenizer", name)
    try:
        subject = _open("--tokenizer", name)
    except TokenizerError as error:
        if double.status == "ok":
            raise
        return Audit({"tokenizer": str(name)}, (double, skipped("all other checks", str(error))))
    extended = _open("--base", base) if base else None
    findings = (double, *_on_pieces(subject, extended), *_on_text(subject, extended, inputs, key, quiet, tally))
    tokenizer = subject.tokenizer
    facts = {
        "tokenizer": str(tokenizer.path),
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "base": str(extended.tokenizer.path) if extended else None,
        "inputs": [str(path) for path in inputs],
    }
    return Audit(facts, findings)


def _duplicates(flag: str, name: Path) -> Finding:
    """Apart from the other checks, as sentencepiece does not load a model that has a piece twice."""
    path = find(flag, name)
    content = read_bytes(flag, path)
    if is_json(path, content):
        return check_duplicates(entries(parse_json(flag, path, content)))
    return check_duplicates((piece.piece, index) for index, piece in enumerate(read_model(flag, path).pieces))


def _open(flag: str, name: Path) -> _Subject:
    tokenizer = open_tokenizer(flag, name)
    content = read_bytes(flag, tokenizer.path)
    if is_json(tokenizer.path, content):
        return _Subject(tokenizer, None, None, f"this {why_not_a_model(content)}")
    proto = read_model(flag, tokenizer.path)
    algorithm = TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).lower()
    return _Subject(replace(tokenizer, kind=f"{tokenizer.kind} {algorithm}"), proto, dead_pieces(proto))


def _on_pieces(subject: _Subject, base: _Subject | None) -> Iterator[Finding]:
    """The checks that need no text, except that for duplicates."""
    if subject.proto is None or subject.dead is None:
        yield skipped("dead pieces", subject.no_proto)
    else:
        yield check_dead(subject.proto, subject.dead, base.tokenizer if base else None)
    if base is None:
        yield skipped("lost base pieces", _NO_BASE)
    else:
        yield check_lost(subject.tokenizer, base.tokenizer, subject.dead, base.dead)
    yield check_coverage(subject.tokenizer)
    yield check_special_tokens("--tokenizer", subject.tokenizer)


def _on_text(
    subject: _Subject,
    base: _Subject | None,
    inputs: Sequence[Path],
    key: str,
    quiet: bool,
    tally: Tally | None,
) -> Iterator[Finding]:
    """The checks on text. That of slow and fast tokenizer begins with the text of each piece."""
    tokenizer = subject.tokenizer
    checks: list[TokenRate | LineCheck] = [byte_rate(tokenizer), unknown_rate(tokenizer), round_trip(tokenizer)]
    checks += [changed_lines(tokenizer, base.tokenizer)] if base else []
    both = _slow_and_fast(tokenizer, quiet)
    lines = 0
    with progress_bar("--input", inputs, quiet or not inputs) as bar:
        for line in read_lines(inputs, key, bar.update, tally=tally):
            lines += 1
            ids = tokenizer.encode(line)
            for check in (*checks, both) if both else checks:
                check.see(line, ids)
    if inputs and not lines:
        raise TokenizerError("--input holds no text")
    yield from (check.finding() if inputs else skipped(check.name, "needs text: give --input") for check in checks)
    if base is None:
        yield skipped("changed lines", _NO_BASE)
    yield both.finding() if both else skipped("slow and fast", "needs a tokenizer.model and a tokenizer.json beside it")


def _slow_and_fast(tokenizer: Tokenizer, quiet: bool) -> LineCheck | None:
    """The check against the tokenizer.json in the directory of a tokenizer.model; it has seen all pieces."""
    beside = tokenizer.beside("tokenizer.json")
    if beside is None or beside == tokenizer.path:
        return None
    check = disagreement(tokenizer, open_tokenizer("--tokenizer", beside))
    for piece in tqdm(tokenizer.pieces.values(), desc="pieces", unit="piece", disable=quiet, file=sys.stderr):
        text = piece.replace("▁", " ")
        check.see(text, tokenizer.encode(text))
    return check
