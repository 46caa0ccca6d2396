"""Is the data what training needs? Asked before anything is started, answered in seconds."""

from collections.abc import Sequence

import numpy as np

from megatron_ext.errors import RequestError
from pretrain.data.config import DataConfig
from pretrain.data.corpora import Corpus, read_corpora, require_training_samples
from pretrain.data.sidecar import check_tokenizers, read_sidecar
from pretrain.data.tokenizer_file import eod_token
from tokenizer.formats.load import read_tokenizer

MOST_WORKERS = 1024
SCAN_BYTES = 16 << 20


def check_data(config: DataConfig, seq_length: int, vocab_size: int, *, splits: Sequence[str] = ("train",)) -> None:
    """Refuse what cannot be trained on, without starting megatron-core or a process group.

    Reads headers, document lengths, the sidecar that tools.preprocess_data leaves beside a corpus, and where
    there is none the first 16 MiB of tokens. (Later tokens are checked batch by batch while training.)

    Args:
        config: the data flags.
        seq_length: tokens in a sample.
        vocab_size: of the model; ids 0 .. vocab_size - 1 are allowed.
        splits: those that will be read; each must hold a sample.

    Raises:
        RequestError: in one line, what is wrong and what would do.
    """
    if not 0 <= config.num_workers <= MOST_WORKERS:
        raise RequestError(f"--num-workers {config.num_workers}: give 0 or more, and at most {MOST_WORKERS}")
    corpora = read_corpora(config)
    tokenizer = read_tokenizer("--tokenizer-model", config.tokenizer_model) if config.tokenizer_model else None
    if tokenizer and tokenizer.vocab_size > vocab_size:
        raise RequestError(
            f"--tokenizer-model {config.tokenizer_model}: tokenizer larger than the vocabulary: it has "
            f"{tokenizer.vocab_size} pieces, --vocab-size is {vocab_size}; set --vocab-size {tokenizer.vocab_size}"
        )
    check_tokenizers(config)
    eod = eod_token(config) if config.eod_flags else None
    if eod is not None and not 0 <= eod < vocab_size:
        raise RequestError(f"--eod-token-id {eod} is outside the vocabulary of {vocab_size}")
    require_training_samples(corpora, config.split, seq_length)
    for corpus in corpora:
        _check_tokens(corpus, config, vocab_size, eod)
    for split in splits:
        if not any(corpus.samples(split, seq_length) for corpus in corpora):
            raise RequestError(
                f"--split {config.split} leaves no sample of {seq_length} tokens for the {split} split; "
                "give it a larger share, add data, or shorten --seq-length"
            )


def _check_tokens(corpus: Corpus, config: DataConfig, vocab_size: int, eod: int | None) -> None:
    sidecar = read_sidecar(corpus)
    if sidecar is None:
        count = min(corpus.index.tokens, SCAN_BYTES // corpus.index.dtype.itemsize)
        tokens = np.fromfile(corpus.prefix + ".bin", dtype=corpus.index.dtype.newbyteorder("<"), count=count)
        low, high = int(tokens.min()), int(tokens.max())
        has_eod = eod is None or bool((tokens == eod).any())
    else:
        low, high = 0, sidecar["max_token_id"]
        has_eod = eod is None or (sidecar["append_eod"] and sidecar["eod_token_id"] == eod)
    if low < 0 or high >= vocab_size:
        raise RequestError(
            f"--data-path {corpus.prefix}: token id {high if low >= 0 else low} is outside the vocabulary of "
            f"{vocab_size}; the corpus was made with another tokenizer, or --vocab-size is too small"
        )
    if not has_eod:
        raise RequestError(
            f"{', '.join(config.eod_flags)}: no document of --data-path {corpus.prefix} ends with token {eod}; "
            "preprocess it with --append-eod, or give the right --eod-token-id"
        )
