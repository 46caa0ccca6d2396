"""Everything that can be found wrong with a request before a process joins the others or allocates memory."""

import os

import torch

from megatron_ext.checkpoint import check_compatible, check_trained, read_manifest
from megatron_ext.checkpoint.metadata import TensorReader
from megatron_ext.checkpoint.save import check_writable
from megatron_ext.errors import RequestError
from megatron_ext.option import flag_of, refuse_unused
from pretrain.callbacks import load_callbacks
from pretrain.config import RunConfig
from pretrain.data import check_data
from pretrain.resize import plan_expansion
from pretrain.run_tokenizer import run_tokenizer


def validate(config: RunConfig) -> None:
    """Raise RequestError for the first thing that cannot be done as asked. Writes nothing, talks to nobody.

    Imports what --callback names.
    """
    config.dry.validate()
    config.training.validate()
    config.checkpoint.validate()
    config.logging.validate()
    assert config.training.train_iters is not None
    config.engine.optimizer.validate(config.training.train_iters)
    config.engine.validate(config.dry.ranks)
    config.engine.attention(*devices(config), documents=config.data.reset_attention_mask)
    if config.data.data_path:
        splits = ("train",) if config.training.eval_interval is None else ("train", "valid")
        check_data(config.data, config.engine.batch.seq_length, config.engine.model.vocab_size, splits=splits)
    elif not config.dry.dry_run:
        raise RequestError("--data-path is required: PREFIX of a corpus written by python -m tools.preprocess_data")
    if not config.data.eod_flags:
        needed = "--reset-position-ids, --reset-attention-mask or --eod-mask-loss"
        refuse_unused(config.data, ("eod_token_id",), needed)
    start, manifest = config.checkpoint.start(), None
    if start.checkpoint is not None:
        manifest = read_manifest(start.checkpoint, start.flag)
        expansion, overridden = plan_expansion(config, start), config.checkpoint.overridden
        check_compatible(manifest, config.engine.model, start.checkpoint, expansion, overridden, start.flag)
        check_trained(manifest, config.engine, start.checkpoint, start.weights_only, start.flag)
        TensorReader(start.checkpoint, start.flag)
    run_tokenizer(config, start, manifest)
    if config.checkpoint.save is not None:
        check_writable(config.checkpoint.save)
    if config.data.data_cache_path is not None:
        check_writable(config.data.data_cache_path, "--data-cache-path")
    for name in ("tensorboard_dir", "wandb_save_dir"):
        folder = getattr(config.logging, name)
        if folder is not None:
            check_writable(folder, flag_of(name))
    if config.logging.metrics is not None and not os.access(os.path.dirname(config.logging.metrics) or ".", os.W_OK):
        raise RequestError(f"--metrics {config.logging.metrics}: its folder is not writable")
    load_callbacks(config.callbacks)


def devices(config: RunConfig) -> list[torch.device]:
    """Kinds of device that the run is for, the likeliest first: what is here, or in a dry run whatever may be."""
    if config.dry.dry_run and not torch.cuda.is_available():
        return [torch.device("cuda"), torch.device("cpu")]
    return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
