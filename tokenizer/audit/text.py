"""Checks of a tokenizer that see text line by line, and keep counts and the first examples."""

from collections.abc import Callable, Sequence, Set

from tokenizer.audit.report import EXAMPLES, Finding, judged, share
from tokenizer.formats.interface import Tokenizer
from tokenizer.text.characters import has_cjk

_MANY_BYTES = 0.05  # of the tokens: beyond this the text is in a language that the vocabulary does not know


class LineCheck:
    """Counts the lines that an objection is raised to.

    Args:
        name: of the check.
        objection: line and ids to a line of report, or None when there is nothing to say.
        meaning: of an objection, to end the sentence "3 of 10 lines ...".
        applies: whether a line is looked at.
    """

    def __init__(
        self,
        name: str,
        objection: Callable[[str, list[int]], str | None],
        meaning: str,
        applies: Callable[[str], bool] = lambda line: True,
    ) -> None:
        self.name, self._objection, self._meaning, self._applies = name, objection, meaning, applies
        self._seen = self._count = 0
        self._examples: list[str] = []

    def see(self, line: str, ids: list[int]) -> None:
        """Take a line, and the tokenizer's ids of it."""
        if not self._applies(line):
            return
        self._seen += 1
        example = self._objection(line, ids)
        if example is not None:
            self._count += 1
            if len(self._examples) < EXAMPLES and example not in self._examples:
                self._examples.append(example)

    def finding(self) -> Finding:
        """Give the result for all lines seen."""
        summary = f"{share(self._count, self._seen)} {self._meaning}"
        figures = {"lines": self._seen, "objections": self._count}
        return judged(self.name, self._count > 0, summary, self._examples, figures)


class TokenRate:
    """How many of the tokens are among some ids.

    Args:
        name: of the check.
        ids: to look for.
        most: the share of them that is no warning.
        meaning: of such tokens, to end the sentence "3 of 10 tokens ...".
    """

    def __init__(self, name: str, ids: Set[int], most: float, meaning: str) -> None:
        self.name, self._ids, self._most, self._meaning = name, ids, most, meaning
        self._tokens = self._found = 0
        self._examples: list[str] = []

    def see(self, line: str, ids: list[int]) -> None:
        """Take a line, and the tokenizer's ids of it."""
        found = sum(index in self._ids for index in ids)
        self._tokens += len(ids)
        self._found += found
        if found and len(self._examples) < EXAMPLES:
            self._examples.append(f"{found} of {len(ids)} in {line[:40]!r}")

    def finding(self) -> Finding:
        """Give the rate in all lines seen."""
        summary = f"{share(self._found, self._tokens)} tokens {self._meaning}"
        figures = {"tokens": self._tokens, "found": self._found}
        return judged(self.name, self._found > self._most * self._tokens, summary, self._examples, figures)


def byte_rate(tokenizer: Tokenizer) -> TokenRate:
    """Count how many tokens are parts of characters."""
    return TokenRate("byte fallback", tokenizer.byte_ids, _MANY_BYTES, "are parts of characters")


def unknown_rate(tokenizer: Tokenizer) -> TokenRate:
    """Count how many tokens stand for lost text."""
    ids = frozenset() if tokenizer.unk_id is None else frozenset({tokenizer.unk_id})
    return TokenRate("unknown", ids, 0.0, "are <unk>: their text is lost")


def round_trip(tokenizer: Tokenizer) -> LineCheck:
    """Count lines that encoding and decoding changes."""

    def objection(line: str, ids: list[int]) -> str | None:
        decoded = tokenizer.decode(ids)
        if decoded == line:
            return None
        place = _first_difference(line, decoded)
        start = max(0, place - 10)
        return f"{line[start : place + 20]!r} -> {decoded[start : place + 20]!r}"

    return LineCheck("round trip", objection, "lines are changed by encoding and decoding them")


def changed_lines(tokenizer: Tokenizer, base: Tokenizer) -> LineCheck:
    """Count lines without CJK characters that are cut into other pieces than by the base."""

    def objection(line: str, ids: list[int]) -> str | None:
        return _different_cut(_cut(base, base.encode(line)), _cut(tokenizer, ids))

    return LineCheck(
        "changed lines",
        objection,
        "lines without CJK characters are cut differently than by the base",
        lambda line: not has_cjk(line),
    )


def disagreement(slow: Tokenizer, fast: Tokenizer) -> LineCheck:
    """Count texts of which the tokenizer.model and the tokenizer.json give different ids."""

    def objection(line: str, ids: list[int]) -> str | None:
        others = fast.encode(line)
        if others == ids:
            return None
        return _different_cut(_cut(slow, ids), _cut(fast, others)) or f"{line[:40]!r}: other ids for the same pieces"

    return LineCheck(
        "slow and fast", objection, "pieces and lines get other ids from tokenizer.json than from the model"
    )


def _cut(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.pieces.get(index, f"id {index}") for index in ids]


def _different_cut(one: Sequence[str], other: Sequence[str]) -> str | None:
    """The first difference of two lists of pieces with what is around it, None for equal ones."""
    if one == other:
        return None
    place = _first_difference(one, other)
    start = max(0, place - 2)
    return "  ->  ".join("|".join(pieces[start : place + 5]) for pieces in (one, other))


def _first_difference(one: Sequence[str], other: Sequence[str]) -> int:
    same = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(same, min(len(one), len(other)))
