"""A merge that leaves the base as it is: the mode `clean`."""

from collections.abc import Callable, Iterable
from unicodedata import category

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from tokenizer.errors import TokenizerError
from tokenizer.formats.sentencepiece_model import normalization_check
from tokenizer.merge.candidates import Candidates, candidates, compounds, standard_characters, traditional_characters
from tokenizer.merge.chinese_llama import EXTRA_PIECES, PAD, PADDING, Merged, new_pieces, refuse_second_pad
from tokenizer.merge.corpus import Expected, tune, worth
from tokenizer.merge.selection import extend, select

STEPS = 3
# Of the new pieces, those for a word and a mark or for two words. Without a corpus their shares are guesses.
_JOINT_GUESSED, _JOINT_COUNTED = 1 / 12, 1 / 8
_LEAST_EXPECTED = 1e-7  # share of a joint piece
# Models of Chinese are mostly trained on simplified text, where traditional characters are rarer than in their own.
_TRADITIONAL_WEIGHT = 3


def merge_clean(
    base: ModelProto,
    extra: ModelProto,
    advance: Callable[[int], object],
    *,
    target_size: int | None = None,
    pad: bool = False,
    corpus: Callable[[], Iterable[str]] | None = None,
) -> Merged:
    """Add Chinese pieces so that every text without CJK characters is encoded as before, token for token.

    New pieces have a CJK character and merge after everything of the base. All can be reached. Candidates are the
    pieces of `extra`, the common characters (GB 2312 and Big5, level 1), and words with a punctuation mark or a space;
    they are ranked by the tokens that they are expected to save.

    Args:
        base: a BPE model.
        extra: a model with Chinese pieces; the scores of a unigram model are taken as its log-probabilities.
        advance: told of each of `STEPS` steps that is done.
        target_size: pieces in all; by default as many as the published rule would give.
        pad: append `[PAD]`, as a control piece: no text is encoded to it, whatever stands in the text.
        corpus: gives the lines of a text to tune for, each time from the first.

    Raises:
        TokenizerError: the base is no BPE model, `extra` has nothing to add, or the size cannot be had.
    """
    if base.trainer_spec.model_type != TrainerSpec.BPE:
        kind = TrainerSpec.ModelType.Name(base.trainer_spec.model_type).lower()
        raise TokenizerError(
            f"--base is a {kind} model: --mode clean needs a BPE model, in which merges of new pieces can follow all "
            "of the old ones; use --mode chinese-llama"
        )
    if pad:
        refuse_second_pad(base, ())
    room = _room(base, extra, target_size, pad)
    base_pieces = {piece.piece for piece in base.pieces}
    found = candidates(base_pieces, extra)
    if not found.pieces:
        raise TokenizerError("--extra has no Chinese piece that the base lacks: there is nothing to add")
    expected = _expected(found, base_pieces, extra.trainer_spec.character_coverage, normalization_check(base))
    # Saved tokens do not make up for a common character or mark that the model can only spell in bytes.
    marks = {text for text in found.pieces if len(text) == 1 and category(text).startswith("P")}
    characters = marks | standard_characters().intersection(found.pieces)
    single = select(base, _first(characters, expected), expected.frequency, room - int(room * _JOINT_GUESSED))
    advance(1)

    if corpus:
        places = int(room * _JOINT_COUNTED)
        characters |= {text for text in single.order if len(text) == 1}
        expected = tune(base, expected, places, corpus)
        single = select(base, _first(characters, expected), expected.frequency, room - places)
    advance(1)

    chosen = select(base, expected.joint | dict.fromkeys(single.order, 1.0), expected.frequency | expected.joint, room)
    if target_size and len(chosen.order) < room:
        most = target_size - room + len(chosen.order)
        raise TokenizerError(f"--target-size {target_size}: these models yield {most} pieces at most")
    proto = extend(base, chosen.order)
    if pad:
        proto.trainer_spec.pad_id, proto.trainer_spec.pad_piece = len(proto.pieces), PAD
        proto.pieces.add(piece=PAD, type=ModelProto.SentencePiece.CONTROL)
    advance(1)

    groups = _grouped(chosen.order, found, expected) | {PADDING: [PAD] if pad else []}
    given_up = {*single.unreachable, *chosen.unreachable}
    dropped = found.dropped | _left_out(found, expected, given_up, set(chosen.order))
    return Merged("clean", proto, len(base.pieces), len(extra.pieces), groups, dropped)


def _first(chosen: set[str], expected: Expected) -> dict[str, float]:
    """Values in which these come before all others: a value is far below 1."""
    return {text: value + (text in chosen) for text, value in expected.values.items()}


def _room(base: ModelProto, extra: ModelProto, target_size: int | None, pad: bool) -> int:
    new = len(new_pieces(base, extra))
    if target_size is None:
        return new
    least = len(base.pieces) + pad + 1
    if target_size < least:
        raise TokenizerError(f"--target-size {target_size}: the base has {len(base.pieces)}; give {least} or more")
    return target_size - least + 1


def _expected(found: Candidates, base_pieces: set[str], coverage: float, is_stable: Callable[[str], bool]) -> Expected:
    common = sorted(standard_characters() - base_pieces - found.frequency.keys())
    # What the extra model's trainer left uncovered is shared out among the characters that it lacks.
    frequency = found.frequency | dict.fromkeys(common, (1 - coverage) / max(1, len(common)))
    traditional = traditional_characters()
    values = {
        text: worth(text, frequency[text]) * (1 if traditional.isdisjoint(text) else _TRADITIONAL_WEIGHT)
        for text in [*found.pieces, *common]
        if is_stable(text)
    }
    joint = compounds(base_pieces, found, _LEAST_EXPECTED)
    return Expected(values, {text: value for text, value in joint.items() if is_stable(text)}, frequency)


def _grouped(order: list[str], found: Candidates, expected: Expected) -> dict[str, list[str]]:
    given, common, between = set(found.pieces), standard_characters(), "in between, for the merges of others"
    names = (EXTRA_PIECES, "common characters (GB 2312, Big5)", "characters of the corpus",
             "a word and a mark, or two words", between)  # fmt: skip
    groups: dict[str, list[str]] = {name: [] for name in names}
    for text in order:
        matches = (text in given, text in common, text in expected.values, text in expected.joint, True)
        groups[names[matches.index(True)]].append(text)
    return groups


def _left_out(found: Candidates, expected: Expected, given_up: set[str], chosen: set[str]) -> dict[str, list[str]]:
    reasons = (
        "changed by the base's normalization",
        "cannot be reached by merges",
        "worth less than what took their place",
    )
    left_out: dict[str, list[str]] = {reason: [] for reason in reasons}
    for text in found.pieces:
        if text not in chosen:
            matches = (text not in expected.values, text in given_up, True)
            left_out[reasons[matches.index(True)]].append(text)
    return left_out
