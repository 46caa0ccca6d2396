"""What one check of an audit found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name.
        status: "skipped" where the check does not apply, and `summary` says why.
        summary: one line.
        examples: the first few, one line each.
        figures: for programs; may hold all that `examples` shows a few of.
    """

    check: str
    status: Literal["ok", "warning", "skipped"]
    summary: str
    examples: Sequence[str]
    figures: Mapping[str, Any]


EXAMPLES = 10


def judged(
    check: str, bad: bool, summary: str, examples: Sequence[str] = (), figures: Mapping[str, Any] | None = None
) -> Finding:
    """A warning where something is `bad`, with the first of `examples`; else ok."""
    return Finding(check, "warning" if bad else "ok", summary, examples[:EXAMPLES] if bad else (), figures or {})


def skipped(check: str, reason: str) -> Finding:
    """A check that does not apply."""
    return Finding(check, "skipped", reason, (), {})


def share(part: int, whole: int) -> str:
    """`part` of `whole` in words, with the percentage."""
    return f"{part:,} of {whole:,} ({part / whole:.2%})" if whole else "0 of 0"
