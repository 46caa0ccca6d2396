"""What the training data is: corpora, weights, split, tokenizer, masks."""

from dataclasses import dataclass

from megatron_ext.option import flag_of, option


@dataclass(frozen=True)
class DataConfig:
    """Flags of the training data. Names are Megatron-LM's."""

    data_path: tuple[str, ...] = option(
        (),
        "corpora as written by tools.preprocess_data: PREFIX ... or WEIGHT PREFIX WEIGHT PREFIX ...; "
        "without weights every corpus counts by its size",
        metavar="[WEIGHT] PREFIX",
    )
    split: str = option("969,30,1", "shares of the documents for training, validation and test")
    tokenizer_model: str | None = option(
        None, "SentencePiece .model, tokenizer.json, or a directory with one; checked against the data"
    )
    data_cache_path: str | None = option(
        None, "directory of the sample indices (default: `cache` beside the first corpus)"
    )
    num_workers: int = option(0, "processes that read batches ahead on each rank (0: read in the training process)")
    reset_position_ids: bool = option(False, "count positions from zero again after each end-of-document token")
    reset_attention_mask: bool = option(False, "attend within a document only; documents end at end-of-document tokens")
    eod_mask_loss: bool = option(False, "leave out the loss of what follows an end-of-document token")
    eod_token_id: int | None = option(
        None, "id of the end-of-document token (default: the tokenizer model's end-of-sentence id)"
    )

    @property
    def eod_flags(self) -> list[str]:
        """The flags given that work by finding end-of-document tokens."""
        names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        return [flag_of(name) for name in names if getattr(self, name)]
