"""The batches of one data-parallel rank."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_ext.errors import RequestError
from pretrain.data.config import DataConfig
from pretrain.data.corpora import SPLITS, Corpus, read_corpora, require_training_samples
from pretrain.data.masks import document_ids, loss_mask, position_ids
from pretrain.data.order import SampleOrder
from pretrain.data.tokenizer_file import eod_token


def build_data(
    config: DataConfig,
    *,
    seq_length: int,
    vocab_size: int,
    seed: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    global_batch_size: int,
) -> "Data":
    """Open the corpora for one data-parallel rank; builds the index of the training samples when it is not cached.

    Every rank may call this at its own pace; no process group is needed.

    Args:
        config: the data flags.
        seq_length: tokens in a sample.
        vocab_size: ids 0 .. vocab_size - 1 are allowed.
        seed: of the order of samples, 0 <= seed < 2**32.
        dp_rank: this rank's place among the data-parallel ranks.
        dp_size: data-parallel ranks.
        micro_batch_size: samples in a microbatch.
        global_batch_size: samples in a step over all ranks.

    Raises:
        RequestError: the data cannot be used as asked.
    """
    if not 0 <= seed < 2**32:
        raise RequestError(f"--seed {seed}: the order of samples needs 0 <= seed < 2**32")
    if global_batch_size % (micro_batch_size * dp_size):
        raise RequestError(
            f"--global-batch-size {global_batch_size} must be a multiple of --micro-batch-size {micro_batch_size} "
            f"times {dp_size} data-parallel ranks"
        )
    rows = rank_rows(dp_rank, dp_size, micro_batch_size, global_batch_size)
    return Data(config, seq_length, vocab_size, seed, rows, global_batch_size)


def rank_rows(dp_rank: int, dp_size: int, micro_batch_size: int, global_batch_size: int) -> list[int]:
    """Which samples of a step are this rank's, in the order of its microbatches.

    Microbatch k of rank r holds the samples k*mbs*dp + r*mbs and the following ones, as in Megatron-LM.
    """
    starts = range(dp_rank * micro_batch_size, global_batch_size, micro_batch_size * dp_size)
    return [start + row for start in starts for row in range(micro_batch_size)]


class Data:
    """The three splits as seen by one data-parallel rank. Made by `build_data`.

    A batch is a dict of tensors, B = global batch / data-parallel ranks, s = seq_length:

        tokens        int64 [B, s]
        labels        int64 [B, s]     the token after each
        loss_mask     float32 [B, s]   only with eod_mask_loss: 0 where the token ends a document
        document_ids  int64 [B, s]     only with reset_attention_mask: which document of the sample
        position_ids  int64 [B, s]     only with reset_position_ids
    """

    def __init__(
        self,
        config: DataConfig,
        seq_length: int,
        vocab_size: int,
        seed: int,
        rows: Sequence[int],
        global_batch_size: int,
    ) -> None:
        self.config = config
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.seed = seed
        self.rows = tuple(rows)
        self.global_batch_size = global_batch_size
        self.corpora = read_corpora(config)
        require_training_samples(self.corpora, config.split, seq_length)
        self.cache = cache_directory(config, self.corpora)
        self._collate = partial(collate, config=config, eod=eod_token(config) if config.eod_flags else -1)
        self._parts: dict[str, Part] = {}
        self._part("train")

    def train_batches(self, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        """Training batches without end, one per optimizer step.

        Args:
            consumed_samples: samples of all ranks that training has seen before; the first batch follows them.

        Raises:
            RequestError: (while iterating) a token id is outside the vocabulary.
        """
        return self._batches("train", itertools.count(consumed_samples, self.global_batch_size))

    def valid_batches(self, num_batches: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first `num_batches` batches of the validation split, the same ones at each call.

        When the split holds fewer samples it is passed over again.

        Raises:
            RequestError: the split holds no sample.
        """
        return self._fixed("valid", num_batches)

    def test_batches(self, num_batches: int) -> Iterator[dict[str, torch.Tensor]]:
        """As `valid_batches`, of the test split."""
        return self._fixed("test", num_batches)

    def describe(self) -> list[str]:
        """One line per corpus: its share of training, and the samples that one pass over each split gives."""
        weights = blend_weights(self.corpora, "train", self.seq_length)
        return [
            f"{corpus.prefix}: weight {weight / sum(weights):.4f}, {corpus.index.tokens:,} tokens, samples "
            + ", ".join(f"{split} {corpus.samples(split, self.seq_length):,}" for split in SPLITS)
            for corpus, weight in zip(self.corpora, weights)
        ]

    def _fixed(self, split: str, num_batches: int) -> Iterator[dict[str, torch.Tensor]]:
        self._part(split)  # now, so that an empty split is refused at the call and not at the first batch
        return self._batches(split, range(0, num_batches * self.global_batch_size, self.global_batch_size))

    def _part(self, split: str) -> "Part":
        if split not in self._parts:
            self._parts[split] = Part(self.corpora, split, self.seq_length, self.seed, self.cache)
        return self._parts[split]

    def _batches(self, split: str, steps: Iterator[int] | range) -> Iterator[dict[str, torch.Tensor]]:
        part = self._part(split)
        starts, planned = itertools.tee(steps)
        loader = DataLoader(
            part,
            batch_sampler=([part.order[start + row] for row in self.rows] for start in planned),  # type: ignore[arg-type]
            collate_fn=self._collate,
            num_workers=self.config.num_workers,
            multiprocessing_context="fork" if self.config.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # it draws a seed even if nobody uses it: not from the training's stream
        )
        for start, batch in zip(starts, loader):
            self._check_ids(part, start, batch)
            yield batch

    def _check_ids(self, part: "Part", start: int, batch: dict[str, torch.Tensor]) -> None:
        for ids in (batch["tokens"], batch["labels"]):
            low, high = ids.aminmax()
            if low < 0 or high >= self.vocab_size:
                wrong = (ids < 0) | (ids >= self.vocab_size)
                row = int(wrong.any(dim=1).nonzero()[0])
                corpus, _ = part.order[start + self.rows[row]]
                raise RequestError(
                    f"token id {int(ids[wrong][0])} in {part.corpora[corpus].prefix}.bin is outside the vocabulary of "
                    f"{self.vocab_size}; the corpus was made with another tokenizer, or --vocab-size is too small"
                )


class Part(Dataset[np.ndarray]):
    """One split of the blend: the order of its samples, and the samples.

    A corpus too small to have a sample for validation or test takes no part in that split.
    """

    def __init__(self, corpora: Sequence[Corpus], split: str, seq_length: int, seed: int, cache: Path) -> None:
        from pretrain.data.samples import Samples

        self.corpora = [corpus for corpus in corpora if corpus.samples(split, seq_length)]
        if not self.corpora:
            raise RequestError(
                f"--split leaves no sample of {seq_length} tokens for the {split} split; "
                "give it a larger share, add data, or shorten --seq-length"
            )
        self.samples = [Samples(corpus, split, seq_length, seed, cache) for corpus in self.corpora]
        weights = blend_weights(self.corpora, split, seq_length)
        self.order = SampleOrder([len(samples) for samples in self.samples], weights, seed, cache)

    def __getitem__(self, place: tuple[int, int]) -> np.ndarray:
        """Tokens int64 [seq_length + 1] of (corpus, sample)."""
        corpus, sample = place
        return self.samples[corpus][sample]


def blend_weights(corpora: Sequence[Corpus], split: str, seq_length: int) -> list[float]:
    """The weight of each corpus: as given, or its number of samples."""
    return [float(corpus.samples(split, seq_length)) if corpus.weight is None else corpus.weight for corpus in corpora]


def collate(samples: Sequence[np.ndarray], config: DataConfig, eod: int) -> dict[str, torch.Tensor]:
    """A batch as `Data` describes it, from samples int64 [s + 1]."""
    text = torch.from_numpy(np.stack(samples))
    tokens = text[:, :-1].contiguous()
    batch = {"tokens": tokens, "labels": text[:, 1:].contiguous()}
    if config.eod_mask_loss:
        batch["loss_mask"] = loss_mask(tokens, eod)
    if config.reset_attention_mask:
        batch["document_ids"] = document_ids(tokens, eod)
    if config.reset_position_ids:
        batch["position_ids"] = position_ids(tokens, eod)
    return batch


def cache_directory(config: DataConfig, corpora: Sequence[Corpus]) -> Path:
    """Where the sample indices are kept."""
    return Path(config.data_cache_path) if config.data_cache_path else Path(corpora[0].prefix).parent / "cache"
