"""The samples of one split of one corpus, which megatron-core cuts from its documents.

Importing this module imports megatron-core: callers do so where they need it.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pretrain.data.cache import cached_arrays, digest
from pretrain.data.corpora import Corpus
from pretrain.data.masks import document_lengths, loss_mask
from pretrain.data.source import Sample


@contextlib.contextmanager
def _for_data_alone() -> Iterator[None]:
    """Import megatron-core without what its datasets do not use, which takes three seconds: wandb, and the compiler of
    torch, which its layers call (and which fails where the locale is not UTF-8). It warns of every optional library.
    """
    compiler, hides_wandb = torch.compile, "wandb" not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile = lambda model=None, **_: (lambda function: function) if model is None else model  # type: ignore[assignment]
        if hides_wandb:
            sys.modules["wandb"] = None  # type: ignore[assignment]  # as if it were not installed
        try:
            yield
        finally:
            torch.compile = compiler
            if hides_wandb:
                del sys.modules["wandb"]


with _for_data_alone():
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import (
        GPTDataset,
        GPTDatasetConfig,
        _build_document_index,
        _build_shuffle_index,
    )
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split


class GPTSource(GPTDataset):
    """A `Source`: one pass over the documents of one split, exactly as a GPTDataset of one epoch goes over them.

    Two things differ from GPTDataset. The indices are built by whichever process comes first, under a file lock,
    where GPTDataset relies on global rank 0 (so every node may have its own disk); and they are named by the
    document lengths, not by the path, so a corpus that was preprocessed anew never meets an old index.

    Args:
        corpus: to read.
        split: train, valid or test.
        seq_length: tokens in a sample; each brings one more, the label of its last token.
        seed: of the shuffle, 0 <= seed < 2**32.
        cache: directory of the indices.
        eod: the token that ends a document; None: a sample is one document, whatever is in it.
        mask_loss: whether what follows an `eod` carries no loss.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        seq_length: int,
        seed: int,
        cache: Path,
        eod: int | None = None,
        mask_loss: bool = False,
    ) -> None:
        self._cache, self._eod, self._mask_loss = cache, eod, mask_loss
        self._lengths_checksum = corpus.checksum
        documents = corpus.documents(split)
        # megatron-core wants a tokenizer for its masks and padding; one pass has no padding, masks are made later.
        tokenizer: Any = SimpleNamespace(vocab_size=None, eod=-1, unique_identifiers={})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = GPTDatasetConfig(
                random_seed=seed,
                sequence_length=seq_length,
                blend=([corpus.prefix], None),
                split="1",
                path_to_cache=str(cache),
                tokenizer=tokenizer,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            super().__init__(
                IndexedDataset(corpus.prefix),
                corpus.prefix,
                np.arange(documents.start, documents.stop, dtype=np.int32),
                None,
                Split[split],
                config,
            )

    def __getitem__(self, index: int | None) -> Sample:  # type: ignore[override]
        text = self._query_document_sample_shuffle_indices(index or 0)[0]  # int64 [seq_length + 1]
        tokens, mask = text[:-1], None
        if self._mask_loss:
            assert self._eod is not None
            mask = loss_mask(tokens, self._eod)
        return Sample(tokens, text[1:], mask, document_lengths(tokens, self._eod))

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seed, seq_length = self.config.random_seed, self.config.sequence_length
        documents = (int(self.indices[0]), len(self.indices))
        key = f"samples-{digest(self._lengths_checksum, len(self.dataset), documents, seq_length, seed)}"
        arrays = cached_arrays(self._cache, key, ("documents", "samples", "shuffle"), self._build_indices)
        return arrays["documents"], arrays["samples"], arrays["shuffle"]

    def _build_indices(self) -> dict[str, np.ndarray]:
        random = np.random.RandomState(self.config.random_seed)
        documents = _build_document_index(self.indices, 1, random, False)
        lengths = np.array(self.dataset.sequence_lengths)
        tokens = self._get_num_tokens_per_epoch()
        samples = helpers.build_sample_idx(lengths, documents, self.config.sequence_length, 1, tokens)
        count = len(samples) - 1
        return {"documents": documents, "samples": samples, "shuffle": _build_shuffle_index(count, count, random)}


def blending_indices(weights: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Megatron's greedy blend: at each place the corpus that lags its weight most.

    Args:
        weights: float64 [corpora], sum 1.
        length: places to fill.

    Returns:
        `corpus` int16 [length], and `sample` int64 [length]: how many samples of that corpus came before.
    """
    corpus = np.zeros(length, dtype=np.int16)
    sample = np.zeros(length, dtype=np.int64)
    helpers.build_blending_indices(corpus, sample, weights, len(weights), length, False)
    return {"corpus": corpus, "sample": sample}
