"""Does transformers give the ids that training used, and the text back?"""

import dataclasses
from pathlib import Path
from typing import Any

from tokenizer.formats.interface import Tokenizer
from tokenizer.formats.record import TEXTS, TokenizerRecord
from tools.conversion.proof.run_transformers import NotRunnable


@dataclasses.dataclass(frozen=True)
class Differences:
    """Between a tokenizer and what transformers makes of its files, in words for after its name.

    Attributes:
        ids: the first text of other ids, or another end of sentence; None where all are training's.
        text: the first text that is not the same after encoding and decoding, or None.
        begins: whether a text begins with the begin-of-sentence token there.
    """

    ids: str | None
    text: str | None
    begins: bool

    @property
    def severity(self) -> int:
        return 2 if self.ids else 1 if self.text else 0

    def __str__(self) -> str:
        start = f"AutoTokenizer gives training's ids ({len(TEXTS)} texts, English and Chinese)"
        bos = "with" if self.begins else "without"
        return f"{start}, {bos} a begin-of-sentence id before them; " + (
            f"its decoding {self.text}" if self.text else "and the same text back"
        )


def compare_tokenizers(tokenizer: Tokenizer, record: TokenizerRecord, folder: Path) -> Differences:
    """Compare training's tokenizer with transformers' AutoTokenizer of `folder`.

    Raises:
        NotRunnable: transformers is not there.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise NotRunnable("transformers is not installed: pip install transformers") from None
    try:
        theirs: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds, by class
        reason = " ".join(str(error).split())
        return Differences(f"cannot load it ({type(error).__name__}: {reason})", None, False)
    first = [tokenizer.bos_id] if record.prepend_bos and tokenizer.bos_id is not None else []
    ids, text = _other_special(tokenizer, theirs), None
    for given in TEXTS:
        expected = tokenizer.encode(given)
        found = theirs(given, add_special_tokens=False).input_ids
        if record.prepend_bos is not None and found == expected:
            expected, found = first + expected, theirs(given).input_ids
        if ids is None and found != expected:
            place = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), 0)
            ids = f"gives {given!r} other ids than training, from place {place} on: {_few(found)}, not {_few(expected)}"
        back, whole = theirs.decode(tokenizer.encode(given)), tokenizer.decode(tokenizer.encode(given))
        if text is None and back != whole:
            text = f"makes {back!r} of {whole!r}"
    begins = theirs("a").input_ids[:1] == [tokenizer.bos_id]
    return Differences(ids, text, begins)


def _other_special(tokenizer: Tokenizer, theirs: Any) -> str | None:
    for name, own in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        index = getattr(theirs, f"{name}_token_id")
        if index != own:
            return f"has {name} id {index} instead of {own}"
    return None


def _few(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:12]))}{', ...' if len(ids) > 12 else ''}]"
