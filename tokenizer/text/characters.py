"""Which characters are Chinese text, and where it runs in a line."""

import re
from collections.abc import Iterator

# Han by Unicode's blocks: radicals, extension A, unified, compatibility ideographs, and planes 2 and 3 (extensions).
_HAN = "\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# CJK symbols and punctuation, vertical and compatibility forms, full-width forms (letters and digits among them).
_CJK_PUNCTUATION = "\u3000-\u303f\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef"
# Chinese writes these too, but so do other languages: ‘ ’ “ ” … — and the middle dot of foreign names.
SHARED_PUNCTUATION = "‘’“”…—·"

_CJK = re.compile(f"[{_HAN}{_CJK_PUNCTUATION}]")
_RUN = re.compile(f"[{_HAN}{_CJK_PUNCTUATION}{SHARED_PUNCTUATION}]+")


def has_cjk(text: str) -> bool:
    """Tell whether a Han character, or punctuation that only CJK text has, is in `text`."""
    return _CJK.search(text) is not None


def chinese_runs(text: str) -> Iterator[str]:
    """Find the longest stretches of Han and CJK punctuation in `text`.

    Quotation marks, dashes and dots that other languages share belong to a run, but do not make one.
    """
    return (run for run in _RUN.findall(text) if has_cjk(run))
