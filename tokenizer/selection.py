"""Which candidates become pieces, in which order they merge, and the pieces that they need in between."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from math import log

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.reachable import encoder_alone

_RARE = 1e-7  # the share of tokens assumed for what has none
_ATTEMPTS = 8  # a piece that is not reached by then is given up


@dataclass(frozen=True)
class Closed:
    """Pieces that all can be reached.

    Attributes:
        order: the pieces, first merge first.
        between: those among them that were added for others to pass through.
        unreachable: what was given up.
    """

    order: list[str]
    between: list[str]
    unreachable: list[str]


def extend(base: ModelProto, pieces: Sequence[str]) -> ModelProto:
    """`base` and new pieces, merged in this order after everything of the base.

    Their scores are distinct and lie below the lowest of the base, so no merge of the base gives way to a new one,
    and the order does not depend on where in the text a pair stands.
    """
    proto = ModelProto()
    proto.CopyFrom(base)
    lowest = min(piece.score for piece in base.pieces)
    step = max(1.0, 2 * float(np.spacing(np.float32(abs(lowest)))))  # scores are float32
    for place, text in enumerate(pieces, start=1):
        proto.pieces.add(piece=text, score=lowest - step * place)
    return proto


def merge_order(pieces: Iterable[str], frequency: Mapping[str, float]) -> list[str]:
    """Pieces in the order in which they should merge: the most cohesive first.

    Cohesion is the pointwise mutual information of a piece's best two halves, log p(ab) / (p(a) p(b)): what occurs
    together more often than by chance is joined before what does not, which comes close to the most probable cut.
    """

    def cohesion(text: str) -> float:
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        apart = (log(frequency.get(left, _RARE)) + log(frequency.get(right, _RARE)) for left, right in halves)
        return log(frequency.get(text, _RARE)) - max(apart, default=0.0)

    return sorted(pieces, key=lambda text: (len(text) > 1, -cohesion(text), text))


def close(base: ModelProto, pieces: Iterable[str], frequency: Mapping[str, float]) -> Closed:
    """Put pieces into merge order and add those that their merges pass through.

    A unigram model's piece needs no smaller ones; a BPE model builds each from two. What is missing is seen where the
    encoding of a piece breaks off. Of the pairs that would lead on, the one that helps most pieces is added, among
    equals the one that would occur least by chance.

    Args:
        base: a BPE model.
        pieces: to be reachable.
        frequency: share of tokens, for the merge order.
    """
    wanted, known = set(pieces), {piece.piece for piece in base.pieces}
    between = {letter for text in wanted for letter in text} - wanted - known
    unreachable: list[str] = []

    def chance(pair: tuple[str, str]) -> float:
        return frequency.get(pair[0], _RARE) * frequency.get(pair[1], _RARE)

    for attempt in count():
        order = merge_order(wanted | between, frequency)
        encoded = encoder_alone(extend(base, order))(order)
        broken = {text: parts for text, parts in zip(order, encoded, strict=True) if parts != [text]}
        if not broken:
            return Closed(order, sorted(between), unreachable)
        missing: set[str] = set()
        helps = Counter(pair for parts in broken.values() for pair in pairwise(parts))
        for text, parts in broken.items():
            pairs = [pair for pair in pairwise(parts) if "".join(pair) not in wanted | between]
            if attempt < _ATTEMPTS and text in wanted and "".join(parts) == text and pairs:
                missing.add("".join(max(pairs, key=lambda pair: (helps[pair], -chance(pair)))))
            else:  # normalization changes it, or other merges always cut through it
                wanted.discard(text)
                between.discard(text)
                unreachable.append(text)
        between |= missing
    raise AssertionError("count() does not end")


def fit(base: ModelProto, values: Mapping[str, float], frequency: Mapping[str, float], room: int) -> Closed:
    """The pieces of most value that fit into `room`, with those that they need in between."""
    ranked = sorted(values, key=lambda text: (-values[text], text))
    taken = room
    while True:
        closed = close(base, ranked[:taken], frequency)
        excess = len(closed.order) - room
        if excess <= 0:
            return closed
        taken = min(taken, len(ranked)) - excess
