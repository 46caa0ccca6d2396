"""What a corpus says: how often a vocabulary's pieces occur in it, alone and next to each other."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.characters import chinese_runs
from tokenizer.reachable import encoder_alone

_BATCH = 1000
# A pair takes about 150 bytes; the rarest go when there are more.
_MOST_PAIRS = 2_000_000


@dataclass
class Evidence:
    """Counts over the Chinese runs of a corpus.

    Attributes:
        tokens: in all.
        pieces: occurrences of each piece.
        pairs: of two pieces that may become one, keyed by their joint text.
        letters: occurrences of each character.
    """

    tokens: int = 0
    pieces: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)


def gather(proto: ModelProto, lines: Iterable[str]) -> Evidence:
    """Count over the Chinese runs of `lines`, in bounded memory.

    Args:
        proto: the model that cuts them.
        lines: of text; read once.
    """
    found, encode, least = Evidence(), encoder_alone(proto), 1
    for runs in batches_of_runs(lines):
        for run, parts in zip(runs, encode(runs), strict=True):
            found.tokens += len(parts)
            found.letters.update(run)
            found.pieces.update(parts)
            found.pairs.update(map("".join, pairwise(parts)))
        while len(found.pairs) > _MOST_PAIRS:
            found.pairs = Counter({text: count for text, count in found.pairs.items() if count > least})
            least += 1
    return found


def batches_of_runs(lines: Iterable[str]) -> Iterator[list[str]]:
    """The Chinese runs of `lines`, many at a time."""
    runs = (run for line in lines for run in chinese_runs(line))
    while batch := list(islice(runs, _BATCH)):
        yield batch
