"""An audit as text, Markdown and JSON."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from tokenizer.audit import Audit
from tokenizer.tables import markdown_table, markdown_text

_MARKS = {"ok": "ok     ", "warning": "warning", "skipped": "-      "}


def as_text(audit: Audit) -> str:
    """The report for the terminal."""
    width = max(len(finding.check) for finding in audit.findings)
    lines = [*(f"{name:{width + 9}}  {value}" for name, value in _facts(audit)), ""]
    for finding in audit.findings:
        lines.append(f"{_MARKS[finding.status]}  {finding.check:{width}}  {finding.summary}")
        lines += [f"{'':{width + 11}}{example}" for example in finding.examples]
    return "\n".join([*lines, "", _counts(audit)])


def as_markdown(audit: Audit) -> str:
    """The report as a page: a table, then the examples."""
    rows = [(finding.check, finding.status, finding.summary) for finding in audit.findings]
    parts = ["# Audit of a tokenizer", markdown_table(("", ""), _facts(audit)), _counts(audit)]
    parts.append(markdown_table(("check", "result", "finding"), rows))
    for finding in audit.findings:
        if finding.examples:
            parts += [f"## {finding.check}", "\n".join(f"- {markdown_text(example)}" for example in finding.examples)]
    return "\n\n".join(parts) + "\n"


def as_json(audit: Audit) -> dict[str, Any]:
    """The report for programs."""
    return {**audit.facts, "findings": [asdict(finding) for finding in audit.findings]}


def _facts(audit: Audit) -> list[tuple[str, str]]:
    shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in audit.facts.items()}
    return [(name, str(value)) for name, value in shown.items() if value]


def _counts(audit: Audit) -> str:
    counts = Counter(finding.status for finding in audit.findings)
    return f"{counts['ok']} ok, {counts['warning']} with a warning, {counts['skipped']} do not apply"
