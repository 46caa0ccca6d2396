"""What is noted of a tokenizer beside the tokens and the weights that it made, and whether another one is the same."""

import dataclasses
from typing import Any

from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import Tokenizer, TokenizerFile, digest

# English and Chinese; spaces before, between, behind; digits; line breaks; what takes several bytes and characters
TEXTS = (
    "To be, or not to be: that is the question.",
    " a space before, two  between, and one behind ",
    "I'm 27,  they're 1984.50 (or 0x1F)...",
    "def f(x):\n\tif x:\n        return [x]\n\n\n",
    "naïve café, “quoted” – Straße",
    "人工智能是计算机科学的一个分支。",
    "我们在2024年1月5日，用Python写了37行代码；你呢？",
    "中文 与 English 混排，（全角）“引号”、《书名》……",
    "　　两个全角空格，\n第二行\r\n第三行",
    "😀👩‍👩‍👧 e\u0301 한국어 Русский",
    "龘靐",
)


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """A tokenizer by its content, wherever it lies and in whichever form.

    Attributes:
        name, kind, vocab_size: for messages; the size also tells two apart.
        sha256: of the file. Equal files are one tokenizer; another file may be the same one.
        vocabulary_sha256, rules_sha256: as `TokenizerFile` has them. None in notes of older versions.
        sample_sha256: of the ids that it gives `TEXTS`; None where it was not asked for any.
        unk_token_id, bos_token_id, eos_token_id, pad_token_id: None where it has none.
        prepend_bos: whether documents began with bos_token_id in training; None where that is not known.
        eod_token_id: what ended documents in training, if that was another token than eos_token_id.
    """

    name: str
    kind: str
    vocab_size: int
    sha256: str
    vocabulary_sha256: str | None = None
    rules_sha256: str | None = None
    sample_sha256: str | None = None
    unk_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    prepend_bos: bool | None = None
    eod_token_id: int | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.kind}, {self.vocab_size} pieces, sha256 {self.sha256[:12]}..."

    def difference(self, other: "TokenizerRecord") -> str | None:
        """Say how `other` is another tokenizer, in words of which it is the subject; None if it is the same one.

        The same is: every id is the same piece, text is cut by the same rules, and texts begin and end with the same
        ids. A SentencePiece model and a tokenizer.json say their rules in different words; between them the pieces
        decide, and where both were asked, the ids of `TEXTS`.
        """
        if other.sha256 != self.sha256:
            if other.vocab_size != self.vocab_size:
                return f"has {other.vocab_size} pieces instead of {self.vocab_size}"
            if None in (self.vocabulary_sha256, other.vocabulary_sha256):
                return "is another file, and older notes do not say what is in a file"
            if other.vocabulary_sha256 != self.vocabulary_sha256:
                return "has other pieces under the same ids"
            if other.kind == self.kind and other.rules_sha256 != self.rules_sha256:
                return "has the same pieces and cuts text by other rules (scores, merges or normalization)"
            if None not in (self.sample_sha256, other.sample_sha256) and other.sample_sha256 != self.sample_sha256:
                return "has the same pieces and cuts the same text into others"
        for name in ("bos_token_id", "eos_token_id"):
            here, there = getattr(other, name), getattr(self, name)
            if None not in (here, there) and here != there:
                return f"has {name.removesuffix('_token_id')} id {here} instead of {there}"
        return None

    def plain(self) -> dict[str, Any]:
        """Give it as JSON takes it."""
        return dataclasses.asdict(self)


def record_of(tokenizer: TokenizerFile) -> TokenizerRecord:
    """Make the record of a tokenizer that has made nothing yet; one that is ready for use is asked for a sample."""
    sample = digest(*(repr(tokenizer.encode(text)) for text in TEXTS)) if isinstance(tokenizer, Tokenizer) else None
    return TokenizerRecord(
        tokenizer.path.name,
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.sha256,
        tokenizer.vocabulary_sha256,
        tokenizer.rules_sha256,
        sample,
        tokenizer.unk_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )


def read_record(plain: Any) -> TokenizerRecord:
    """Read the record that `plain` gave.

    Fields that a later version has added are passed over.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(plain, dict):
        raise ValueError("is no table")
    types = {field.name: field.type for field in dataclasses.fields(TokenizerRecord)}
    for name, type_ in types.items():
        if not isinstance(plain.get(name), type_):  # type: ignore[arg-type]
            raise ValueError(f"{name} {plain.get(name)!r}")
    return TokenizerRecord(**{name: plain.get(name) for name in types})  # type: ignore[arg-type]


def stored_record(plain: Any, where: str) -> TokenizerRecord | None:
    """Read what a checkpoint says of its tokenizer, None where it says nothing.

    Raises:
        TokenizerError: it is no record; the message begins with `where`.
    """
    try:
        return None if plain is None else read_record(plain)
    except ValueError as error:
        raise TokenizerError(f"{where} describes a tokenizer that this program does not know ({error})") from None
