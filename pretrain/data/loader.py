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
from pretrain.data.masks import document_ids, position_ids
from pretrain.data.order import SampleOrder
from pretrain.data.source import Order, Packer, Sample, SampleIndex, Source
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
        self._eod = eod_token(config) if config.eod_flags else None
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
            self._parts[split] = self._open(split)
        return self._parts[split]

    def _open(self, split: str) -> "Part":
        """A corpus too small to have a sample for validation or test takes no part in that split."""
        from pretrain.data.gpt_source import GPTSource

        corpora = [corpus for corpus in self.corpora if corpus.samples(split, self.seq_length)]
        if not corpora:
            raise RequestError(
                f"--split leaves no sample of {self.seq_length} tokens for the {split} split; "
                "give it a larger share, add data, or shorten --seq-length"
            )
        options = (split, self.seq_length, self.seed, self.cache, self._eod, self.config.eod_mask_loss)
        sources: list[Source] = [GPTSource(corpus, *options) for corpus in corpora]
        weights = blend_weights(corpora, split, self.seq_length)
        return Part(corpora, sources, SampleOrder([len(source) for source in sources], weights, self.seed, self.cache))

    def _batches(self, split: str, steps: Iterator[int] | range) -> Iterator[dict[str, torch.Tensor]]:
        part = self._part(split)
        starts, planned = itertools.tee(steps)
        loader = DataLoader(
            part,
            batch_sampler=([part.order[start + row] for row in self.rows] for start in planned),  # type: ignore[arg-type]
            collate_fn=partial(collate, config=self.config),
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


class Part(Dataset[Sample], Packer):
    """One split of the blend: a row is one sample, for the sources' are as long as a row."""

    def __init__(self, corpora: Sequence[Corpus], sources: Sequence[Source], order: Order) -> None:
        self.corpora, self.sources, self.order = corpora, sources, order

    def __getitem__(self, place: SampleIndex) -> Sample:
        corpus, sample = place
        return self.sources[corpus][sample]


def blend_weights(corpora: Sequence[Corpus], split: str, seq_length: int) -> list[float]:
    """The weight of each corpus: as given, or its number of samples."""
    return [float(corpus.samples(split, seq_length)) if corpus.weight is None else corpus.weight for corpus in corpora]


def collate(rows: Sequence[Sample], config: DataConfig) -> dict[str, torch.Tensor]:
    """Make a batch, as `Data` describes it, of samples that are as long as a row."""
    batch = {"tokens": np.stack([row.tokens for row in rows]), "labels": np.stack([row.labels for row in rows])}
    masks, lengths = [row.loss_mask for row in rows if row.loss_mask is not None], [row.lengths for row in rows]
    if masks:
        batch["loss_mask"] = np.stack(masks)
    if config.reset_attention_mask:
        batch["document_ids"] = document_ids(lengths)
    if config.reset_position_ids:
        batch["position_ids"] = position_ids(lengths)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def cache_directory(config: DataConfig, corpora: Sequence[Corpus]) -> Path:
    """Where the sample indices are kept."""
    return Path(config.data_cache_path) if config.data_cache_path else Path(corpora[0].prefix).parent / "cache"
