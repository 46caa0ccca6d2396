"""What training must know of a tokenizer: its size, its end-of-document id, and whether it is the data's own."""

from megatron_ext.errors import RequestError
from pretrain.data.config import DataConfig
from tokenizer import load
from tokenizer.errors import TokenizerError
from tokenizer.interface import TokenizerFile


def read_tokenizer(name: str, flag: str = "--tokenizer-model") -> TokenizerFile:
    """Read the tokenizer that a flag names, as `tokenizer.load.read_tokenizer` does.

    Raises:
        RequestError: it is missing, or no tokenizer.
    """
    try:
        return load.read_tokenizer(flag, name)
    except TokenizerError as error:
        raise RequestError(str(error)) from None


def eod_token(config: DataConfig) -> int:
    """The id that ends a document, for the flags that look for it.

    Raises:
        RequestError: neither `--eod-token-id` nor the tokenizer gives one.
    """
    if config.eod_token_id is not None:
        return config.eod_token_id
    flags = ", ".join(config.eod_flags)
    if config.tokenizer_model is None:
        raise RequestError(f"{flags}: which token ends a document? give --tokenizer-model or --eod-token-id")
    eos = read_tokenizer(config.tokenizer_model).eos_id
    if eos is None:
        raise RequestError(
            f"{flags}: --tokenizer-model {config.tokenizer_model} has no end-of-sentence id; give --eod-token-id"
        )
    return eos
