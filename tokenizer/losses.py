"""What of a text a tokenizer does not keep."""

from tokenizer.interface import Tokenizer


class Losses:
    """Counts characters that a tokenizer does not know and those that its normalization removes.

    Each character is tried once, between two letters: so that one which becomes a space is not taken for removed.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._encode, self._unknown_id = tokenizer.encode, tokenizer.unk_id
        self._around = self._encode("aa")
        self._seen: set[str] = set()
        self._unknown: set[str] = set()
        self._removed: set[str] = set()

    def count(self, text: str) -> tuple[int, int]:
        """Characters of `text` that are unknown, and that are removed."""
        letters = set(text)
        for letter in letters - self._seen:
            if self._unknown_id is not None and self._unknown_id in self._encode(letter):
                self._unknown.add(letter)
            elif self._encode(f"a{letter}a") == self._around:
                self._removed.add(letter)
        self._seen |= letters
        return tuple(sum(map(text.count, letters & kind)) for kind in (self._unknown, self._removed))  # type: ignore[return-value]
