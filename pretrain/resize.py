"""From the flags to how a loaded checkpoint's vocabulary grows."""

from pathlib import Path

from megatron_ext.errors import RequestError
from megatron_ext.models.expand import Expansion
from pretrain.checkpoints import Start
from pretrain.config import RunConfig
from tokenizer.merge.decompose import decompose


def plan_expansion(config: RunConfig, start: Start) -> Expansion | None:
    """How `--embedding-init` lets the vocabulary of the weights grow that the run starts from, None without that flag.

    None too where the run goes on: its own checkpoints have the larger vocabulary.

    Reads the two tokenizers; `config.checkpoint` is validated.

    Raises:
        TokenizerError: the tokenizers do not fit together.
        RequestError: the model's vocabulary is not the new one's.
    """
    options, tokenizer = config.checkpoint, config.data.tokenizer_model
    if options.embedding_init is None or not start.weights_only:
        return None
    assert options.base_tokenizer_model is not None
    if tokenizer is None:
        raise RequestError(f"--embedding-init {options.embedding_init} needs --tokenizer-model: the new tokenizer")
    base = Path(options.base_tokenizer_model)
    new = decompose("--base-tokenizer-model", base, "--tokenizer-model", Path(tokenizer))
    expansion = Expansion(
        old_size=new.old_size,
        parts=new.parts,
        method=options.embedding_init,
        seed=config.training.seed,
        std=config.engine.model.init_method_std,
        norm_correction=options.embedding_norm_correction,
    )
    if config.engine.model.vocab_size != expansion.new_size:
        raise RequestError(
            f"--vocab-size {config.engine.model.vocab_size}: --tokenizer-model {tokenizer} has {expansion.new_size} "
            "pieces, and --embedding-init makes a row for each; leave out --vocab-size"
        )
    return expansion
