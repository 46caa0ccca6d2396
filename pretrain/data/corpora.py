"""What `--data-path` and `--split` say: which corpora, how heavy each, which documents for which split."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_ext.errors import RequestError
from pretrain.data.config import DataConfig
from pretrain.data.index_file import Index, read_index

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Corpus:
    """One corpus of the blend.

    Attributes:
        index: its document lengths.
        weight: its share of the samples, None when corpora count by size.
        split: shares of training, validation and test; they sum to 1.
    """

    index: Index
    weight: float | None
    split: tuple[float, float, float]

    @property
    def prefix(self) -> str:
        """Path without suffix."""
        return self.index.prefix

    def documents(self, split: str) -> range:
        """The documents of `split`: neighbours on disk, cut where megatron-core cuts them."""
        position = SPLITS.index(split)
        start, end = sum(self.split[:position]), sum(self.split[: position + 1])
        count = len(self.index.lengths)
        return range(round(start * count), min(count, round(end * count)))

    def tokens(self, split: str) -> int:
        """Tokens of `split`."""
        return self._tokens[SPLITS.index(split)]

    def samples(self, split: str, seq_length: int) -> int:
        """Samples of `seq_length` tokens (and one label more) that one pass over `split` gives; 0 when none fits."""
        return max(0, self.tokens(split) - 1) // seq_length

    @cached_property
    def _tokens(self) -> list[int]:
        parts = [self.documents(split) for split in SPLITS]
        return [int(self.index.lengths[part.start : part.stop].sum(dtype="int64")) for part in parts]

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the document lengths: what an index of samples depends on."""
        return zlib.crc32(self.index.lengths.data)


def read_corpora(config: DataConfig) -> list[Corpus]:
    """The corpora of a configuration, in the order given.

    Raises:
        RequestError: `--data-path` or `--split` cannot be understood, or a corpus cannot be read.
    """
    split = parse_split(config.split)
    return [Corpus(read_index(prefix), weight, split) for weight, prefix in parse_data_path(config.data_path)]


def require_training_samples(corpora: Sequence[Corpus], split: str, seq_length: int) -> None:
    """Raise RequestError unless every corpus has a training sample of `seq_length` tokens."""
    for corpus in corpora:
        if not corpus.samples("train", seq_length):
            raise RequestError(
                f"--data-path {corpus.prefix}: --split {split} leaves {corpus.tokens('train')} of "
                f"{corpus.index.tokens} tokens for training, too few for one sample of --seq-length {seq_length} "
                "(and one label); add data, change --split, or shorten --seq-length"
            )


def parse_data_path(words: Sequence[str]) -> list[tuple[float | None, str]]:
    """`[WEIGHT] PREFIX ...` as pairs; weights are None where none are given.

    Raises:
        RequestError: nothing given, weights for some corpora only, or a weight that is not a positive number.
    """
    words = [str(word) for word in words]
    given = " ".join(words)
    if not words:
        raise RequestError("--data-path is missing: give the prefix of a corpus written by tools.preprocess_data")
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return [(None, word) for word in words]
    if len(words) % 2:
        raise RequestError(f"--data-path {given}: an odd list with weights; give WEIGHT PREFIX pairs, or no weights")
    pairs: list[tuple[float | None, str]] = []
    for weight, word, prefix in zip(numbers[::2], words[::2], words[1::2]):
        if weight is None:
            raise RequestError(f"--data-path {given}: {word!r} stands where a weight belongs and is not a number")
        if not (weight > 0 and math.isfinite(weight)):
            raise RequestError(f"--data-path {given}: weight {word} of {prefix} must be a positive number")
        pairs.append((weight, prefix))
    return pairs


def parse_split(text: str) -> tuple[float, float, float]:
    """`969,30,1` as three shares that sum to 1; missing ones are 0.

    Raises:
        RequestError: not one to three non-negative numbers, or nothing left for training.
    """
    numbers = [_number(word) for word in str(text).split(",")]
    shares = [number for number in numbers if number is not None and number >= 0 and math.isfinite(number)]
    if len(shares) != len(numbers) or len(shares) > 3:
        raise RequestError(f"--split {text}: give up to three non-negative numbers, as in 969,30,1")
    train, valid, test = [*shares, 0.0, 0.0][:3]
    total = train + valid + test
    if train == 0:
        raise RequestError(f"--split {text} leaves nothing for training; as in 969,30,1 the first number is its share")
    return train / total, valid / total, test / total


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
