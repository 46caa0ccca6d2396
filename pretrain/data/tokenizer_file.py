"""Which token ends a document."""

from megatron_ext.errors import RequestError
from pretrain.data.config import DataConfig
from tokenizer.formats.load import read_tokenizer


def eod_token(config: DataConfig) -> int:
    """The id that ends a document, for the flags that look for it.

    Raises:
        RequestError: neither `--eod-token-id` nor the tokenizer gives one.
        TokenizerError: there is no such tokenizer.
    """
    if config.eod_token_id is not None:
        return config.eod_token_id
    flags = ", ".join(config.eod_flags)
    if config.tokenizer_model is None:
        raise RequestError(f"{flags}: which token ends a document? give --tokenizer-model or --eod-token-id")
    eos = read_tokenizer("--tokenizer-model", config.tokenizer_model).eos_id
    if eos is None:
        raise RequestError(
            f"{flags}: --tokenizer-model {config.tokenizer_model} has no end-of-sentence id; give --eod-token-id"
        )
    return eos
