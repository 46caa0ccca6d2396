"""A corpus's say in which pieces a clean merge adds: how often pieces occur in it, alone and next to each other."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.errors import TokenizerError
from tokenizer.formats.sentencepiece_model import piece_encoder
from tokenizer.merge.candidates import why_not
from tokenizer.merge.selection import complete, extend
from tokenizer.text.characters import chinese_runs

_BATCH = 1000
# A pair takes about 150 bytes; the rarest go when there are more.
_MOST_PAIRS = 2_000_000


@dataclass
class CorpusCounts:
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


def count_corpus(proto: ModelProto, lines: Iterable[str]) -> CorpusCounts:
    """Count over the Chinese runs of `lines`, in bounded memory.

    Args:
        proto: the model that cuts them.
        lines: of text; read once.
    """
    found, encode, least = CorpusCounts(), piece_encoder(proto), 1
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
    """Find the Chinese runs of `lines`, many at a time."""
    runs = (run for line in lines for run in chinese_runs(line))
    while batch := list(islice(runs, _BATCH)):
        yield batch


# Shares counted in the corpus are added to the expected ones with this weight. It lets in what the corpus uses once
# in a few thousand tokens, and is too small for one kind of text to drive out what others need (docs/tokenizer.md
# has the figures). A corpus of few tokens counts for less still.
_WEIGHT = 0.03
_FEW_TOKENS = 100_000
_ROUNDS = 3
_LONGEST = 16  # characters of a piece, as in SentencePiece's trainer


@dataclass(frozen=True)
class Expected:
    """What texts of pieces are expected to be worth.

    Attributes:
        values: a single piece to the tokens that it saves in a token of text.
        joint: the same for two pieces in one.
        frequency: share of tokens, for the merge order.
    """

    values: dict[str, float]
    joint: dict[str, float]
    frequency: dict[str, float]


def tune(base: ModelProto, expected: Expected, room: int, corpus: Callable[[], Iterable[str]]) -> Expected:
    """Add what a corpus says to expected values; also its own characters, and pairs of pieces.

    Pairs are found as BPE finds them (Sennrich, arXiv 1508.07909, algorithm 1): the most frequent become pieces, the
    corpus is cut again with these, and counted again; many at a time, in three readings of the corpus.

    Args:
        base: the base model.
        expected: without the corpus.
        room: for pairs.
        corpus: gives its lines, each time from the first.

    Raises:
        TokenizerError: there is no Chinese text in the corpus.
    """
    existing = {piece.piece for piece in base.pieces}.union(expected.values)
    singles = complete(base, expected.values, expected.frequency).order
    values, joint = dict(expected.values), dict(expected.joint)
    for turn in range(_ROUNDS):
        best = sorted(joint, key=lambda text: (-joint[text], text))[: room * turn // _ROUNDS]
        cut = complete(base, singles + best, expected.frequency | joint)
        found = count_corpus(extend(base, cut.order), corpus())
        if not found.tokens:
            raise TokenizerError("--corpus holds no Chinese text")
        weight = _WEIGHT / (found.tokens + _FEW_TOKENS)
        if turn == 0:
            heard = {text: times for text, times in found.pieces.items() if text in values}
            new = {letter: times for letter, times in found.letters.items() if _may_add(letter, existing)}
            for text, times in (heard | new).items():
                values[text] = values.get(text, 0.0) + worth(text, weight * times)
        for text, times in found.pairs.items():
            if _may_add(text, existing):
                joint[text] = expected.joint.get(text, 0.0) + weight * times
    return Expected(values, joint, expected.frequency)


def worth(text: str, share: float) -> float:
    """Count the tokens that a piece saves in a token of text.

    A character that has no piece takes its bytes. A word takes as many tokens more than one as it needs pieces to
    pass through, its own included, so each of their places saves its share once.
    """
    return share * (len(text.encode()) - 1 if len(text) == 1 else 1)


def _may_add(text: str, existing: Collection[str]) -> bool:
    return len(text) <= _LONGEST and text not in existing and why_not(text) is None
