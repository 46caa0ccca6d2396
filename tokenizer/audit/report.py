"""What the checks of an audit found, and the audit as text, Markdown and JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tokenizer.output import markdown_table, markdown_text


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


@dataclass(frozen=True)
class Audit:
    """What was examined, and a finding for each check.

    Attributes:
        facts: name to value: the tokenizer's file, its kind, size and sha256, the base's file, the texts.
        findings: in the order of the report.
    """

    facts: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def has_warnings(self) -> bool:
        """Whether some check found something."""
        return any(finding.status == "warning" for finding in self.findings)


EXAMPLES = 10


def judged(
    check: str, bad: bool, summary: str, examples: Sequence[str] = (), figures: Mapping[str, Any] | None = None
) -> Finding:
    """Make a warning where something is `bad`, with the first of `examples`; else ok."""
    return Finding(check, "warning" if bad else "ok", summary, examples[:EXAMPLES] if bad else (), figures or {})


def skipped(check: str, reason: str) -> Finding:
    """Say why a check does not apply."""
    return Finding(check, "skipped", reason, (), {})


def share(part: int, whole: int) -> str:
    """Put `part` of `whole` in words, with the percentage."""
    return f"{part:,} of {whole:,} ({part / whole:.2%})" if whole else "0 of 0"


_MARKS = {"ok": "ok     ", "warning": "warning", "skipped": "-      "}


def as_text(audit: Audit) -> str:
    """Format the report for the terminal."""
    width = max(len(finding.check) for finding in audit.findings)
    lines = [*(f"{name:{width + 9}}  {value}" for name, value in _facts(audit)), ""]
    for finding in audit.findings:
        lines.append(f"{_MARKS[finding.status]}  {finding.check:{width}}  {finding.summary}")
        lines += [f"{'':{width + 11}}{example}" for example in finding.examples]
    return "\n".join([*lines, "", _counts(audit)])


def as_markdown(audit: Audit) -> str:
    """Format the report as a page: a table, then the examples."""
    rows = [(finding.check, finding.status, finding.summary) for finding in audit.findings]
    parts = ["# Audit of a tokenizer", markdown_table(("", ""), _facts(audit)), _counts(audit)]
    parts.append(markdown_table(("check", "result", "finding"), rows))
    for finding in audit.findings:
        if finding.examples:
            parts += [f"## {finding.check}", "\n".join(f"- {markdown_text(example)}" for example in finding.examples)]
    return "\n\n".join(parts) + "\n"


def as_json(audit: Audit) -> dict[str, Any]:
    """Give the report for programs."""
    return {**audit.facts, "findings": [asdict(finding) for finding in audit.findings]}


def _facts(audit: Audit) -> list[tuple[str, str]]:
    shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in audit.facts.items()}
    return [(name, str(value)) for name, value in shown.items() if value]


def _counts(audit: Audit) -> str:
    counts = Counter(finding.status for finding in audit.findings)
    return f"{counts['ok']} ok, {counts['warning']} with a warning, {counts['skipped']} do not apply"
