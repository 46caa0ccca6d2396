"""Which tokenizer a run goes by: the flags', the corpora's and the checkpoint's must be one."""

import dataclasses

from megatron_ext.checkpoint import Manifest
from megatron_ext.checkpoint.directory import MANIFEST
from megatron_ext.errors import RequestError
from pretrain.checkpoints import Start
from pretrain.config import RunConfig
from pretrain.data.sidecar import corpus_tokenizers
from tokenizer.formats.load import read_tokenizer
from tokenizer.formats.record import TokenizerRecord, record_of, stored_record

_REMEDY = (
    "give that one; to let the model grow add --finetune --embedding-init METHOD --base-tokenizer-model OLD; to change "
    "the tokenizer on purpose add --finetune --change-tokenizer"
)


def run_tokenizer(config: RunConfig, start: Start, loaded: Manifest | None) -> TokenizerRecord | None:
    """What the run's checkpoints are to say of its tokenizer; None where neither flags, data nor `loaded` know.

    Args:
        config: of which the data have been checked against each other.
        start: where the run begins.
        loaded: the manifest of the checkpoint there.

    Raises:
        RequestError: the checkpoint was trained with another tokenizer.
        TokenizerError: a tokenizer cannot be read, or the manifest's note of one is damaged.
    """
    corpora = corpus_tokenizers(config.data)
    stored = None if loaded is None else stored_record(loaded.tokenizer, f"{start.asked}: {MANIFEST}")
    named, used = _used(config, corpora)
    _check(config, start, stored, named, used)
    record = used or stored
    if record is None:
        return None
    if config.checkpoint.change_tokenizer:  # what else was noted was so of the old one
        stored = None
    begins = {None if made is None else made.prepend_bos for made in corpora.values()} or {None}
    prepend_bos = begins.pop() if len(begins) == 1 else None
    ends, sample = config.data.eod_token_id, record.sample_sha256
    if stored is not None:
        grows = config.checkpoint.embedding_init is not None
        sample = stored.sample_sha256 if sample is None and not grows else sample
        prepend_bos = stored.prepend_bos if prepend_bos is None else prepend_bos
        ends = stored.eod_token_id if ends is None else ends
    eod = None if ends == record.eos_token_id else ends
    return dataclasses.replace(record, sample_sha256=sample, prepend_bos=prepend_bos, eod_token_id=eod)


def _used(config: RunConfig, corpora: dict[str, TokenizerRecord | None]) -> tuple[str, TokenizerRecord | None]:
    """How messages name what says which tokenizer is used, and the tokenizer."""
    prefix, made = next(((prefix, record) for prefix, record in corpora.items() if record is not None), ("", None))
    if config.data.tokenizer_model is not None:
        name = config.data.tokenizer_model
        given = record_of(read_tokenizer("--tokenizer-model", name))
        sample = None if made is None else made.sample_sha256
        return f"--tokenizer-model {name}", dataclasses.replace(given, sample_sha256=sample)
    return f"--data-path {prefix}: what made it", made


def _check(
    config: RunConfig, start: Start, stored: TokenizerRecord | None, named: str, used: TokenizerRecord | None
) -> None:
    options = config.checkpoint
    if options.change_tokenizer and config.data.tokenizer_model is None:
        raise RequestError("--change-tokenizer needs --tokenizer-model: the tokenizer from now on")
    if stored is None or used is None:
        return
    trained = f"the tokenizer that {start.asked} was trained with ({stored})"
    if options.embedding_init is not None and start.weights_only:
        assert options.base_tokenizer_model is not None
        base = read_tokenizer("--base-tokenizer-model", options.base_tokenizer_model)
        if difference := stored.difference(record_of(base)):
            named = f"--base-tokenizer-model {options.base_tokenizer_model}"
            raise RequestError(f"{named} is not {trained}: it {difference}; give that one")
        return
    difference = stored.difference(used)
    changes = options.change_tokenizer and start.weights_only  # a run that goes on has changed it already
    if changes and difference is None:
        raise RequestError(f"--change-tokenizer: {named} is {trained} already; leave out --change-tokenizer")
    if difference is not None and not changes:
        raise RequestError(f"{named} is not {trained}: it {difference}; {_REMEDY}")
