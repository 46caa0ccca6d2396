"""What may be asked of a tokenizer, whatever its format."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer as found on disk; no other package is needed to read it.

    Attributes:
        path: the file itself, also when a directory was given.
        sha256: of the file, in hex.
        kind: the format and algorithm, for messages.
        vocab_size: one more than the largest id.
        pieces: id to piece. Ids of a tokenizer.json may have gaps.
        byte_ids: ids that stand for less than a character: the byte pieces of a model with byte fallback; in
            byte-level BPE the pieces whose bytes are no whole UTF-8 characters.
        unk_id, bos_id, eos_id, pad_id: None where the tokenizer has none.
        rules_sha256: of how text is cut into pieces: scores or merges, and what is done to the text before. Equal for
            two files of one kind that do the same, such as one that was written anew.
    """

    path: Path
    sha256: str
    kind: str
    vocab_size: int
    pieces: Mapping[int, str]
    byte_ids: frozenset[int]
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    rules_sha256: str = field(kw_only=True)

    @property
    def vocabulary_sha256(self) -> str:
        """Of which piece every id is: the same in any form and under any name."""
        return digest(*(f"{index} {self.pieces[index]}" for index in sorted(self.pieces)))

    def beside(self, name: str) -> Path | None:
        """Find the file `name` of the same Hugging Face directory, None where there is none.

        A tokenizer under another name than tokenizer.model or tokenizer.json is taken to stand alone.
        """
        path = self.path.with_name(name)
        return path if self.path.stem == "tokenizer" and path.is_file() else None


def digest(*parts: str | bytes) -> str:
    """Compute the SHA-256 of several parts, in hex; where one ends counts."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()


@dataclass(frozen=True)
class Tokenizer(TokenizerFile):
    """A tokenizer that is ready for use.

    Attributes:
        encode: text to ids, without special tokens; a "</s>" in the text is text.
        decode: ids to text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
