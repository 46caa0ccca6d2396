"""Which candidates become pieces, in which order they merge, and the pieces that they need in between."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import log

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.formats.sentencepiece_model import piece_encoder
from tokenizer.text.characters import has_cjk

_RARE = 1e-7  # the share of tokens assumed for what has none
_ATTEMPTS = 8  # a piece that is not reached by then is given up


@dataclass(frozen=True)
class MergeOrder:
    """Pieces that all can be reached.

    Attributes:
        order: the pieces, first merge first.
        unreachable: what was given up.
    """

    order: list[str]
    unreachable: list[str]


def extend(base: ModelProto, pieces: Sequence[str]) -> ModelProto:
    """Add new pieces to `base`, merged in this order after everything of the base.

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
    """Sort pieces into the order in which they should merge: the most cohesive first.

    Cohesion is the pointwise mutual information of a piece's best two halves, log p(ab) / (p(a) p(b)): what occurs
    together more often than by chance is joined before what does not, which comes close to the most probable cut.
    """

    def cohesion(text: str) -> float:
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        apart = (log(frequency.get(left, _RARE)) + log(frequency.get(right, _RARE)) for left, right in halves)
        return log(frequency.get(text, _RARE)) - max(apart, default=0.0)

    return sorted(pieces, key=lambda text: (len(text) > 1, -cohesion(text), text))


def complete(base: ModelProto, pieces: Iterable[str], frequency: Mapping[str, float]) -> MergeOrder:
    """Put pieces into merge order and add those that their merges pass through.

    A unigram model's piece needs no smaller ones; a BPE model builds each from two. What is missing is seen where the
    encoding of a piece breaks off. Of the pairs that would lead on, the one that helps most pieces is added, among
    equals the one that would occur least by chance.

    Args:
        base: a BPE model.
        pieces: to be reachable.
        frequency: share of tokens, for the merge order.
    """
    wanted, base_pieces = set(pieces), {piece.piece for piece in base.pieces}
    between = {letter for text in wanted for letter in text if has_cjk(letter)} - wanted - base_pieces
    unreachable: list[str] = []

    def chance(pair: tuple[str, str]) -> float:
        return frequency.get(pair[0], _RARE) * frequency.get(pair[1], _RARE)

    attempt = 0
    while True:
        present = wanted | between
        order = merge_order(present, frequency)
        encoded = piece_encoder(extend(base, order))(order)
        broken = {text: parts for text, parts in zip(order, encoded, strict=True) if parts != [text]}
        if not broken:
            return MergeOrder(order, unreachable)
        attempt += 1
        helps = Counter(pair for parts in broken.values() for pair in pairwise(parts))
        for text, parts in broken.items():
            pairs = [pair for pair in pairwise(parts) if has_cjk("".join(pair)) and "".join(pair) not in present]
            if attempt <= _ATTEMPTS and text in wanted and "".join(parts) == text and pairs:
                best = max(pairs, key=lambda pair: (helps[pair], -chance(pair)))
                between.add("".join(best))
            else:  # a letter of it has no piece, or other merges always cut through it
                wanted.discard(text)
                between.discard(text)
                unreachable.append(text)


def select(base: ModelProto, values: Mapping[str, float], frequency: Mapping[str, float], room: int) -> MergeOrder:
    """Choose the pieces of most value that fit into `room`, with those that they need in between.

    Fewer than `room` come back only where `values` has no more that can be reached.
    """
    ranked = iter(sorted(values, key=lambda text: (-values[text], text)))
    chosen = list(islice(ranked, room))
    shrunk = False
    while True:
        completed = complete(base, chosen, frequency)
        gap = room - len(completed.order)
        if gap < 0:
            del chosen[gap:]
            shrunk = True
            continue
        # Once there were too many, only what needs nothing in between may fill the last places.
        present = {piece.piece for piece in base.pieces}.union(completed.order)
        fitting = (text for text in ranked if not shrunk or _joins(text, present))
        more = list(islice(fitting, gap))
        if not more:
            return completed
        chosen += more


def _joins(text: str, present: Collection[str]) -> bool:
    return len(text) == 1 or any(text[:cut] in present and text[cut:] in present for cut in range(1, len(text)))
