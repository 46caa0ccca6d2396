"""What end-of-document tokens mean for a sample. The token itself still belongs to its document."""

from collections.abc import Sequence

import numpy as np


def document_lengths(tokens: np.ndarray, eod: int | None) -> np.ndarray:
    """Count the tokens of every document of a sample [n], cut after each `eod` (None: never); int64 [documents]."""
    ends = np.flatnonzero(tokens[:-1] == eod) + 1 if eod is not None else np.empty(0, dtype=np.int64)
    return np.diff(ends, prepend=0, append=len(tokens))


def loss_mask(tokens: np.ndarray, eod: int) -> np.ndarray:
    """Leave out labels that open an unrelated text: float32 like `tokens`, 0 where the token is an `eod`, else 1."""
    return (tokens != eod).astype(np.float32)


def document_ids(lengths: Sequence[np.ndarray]) -> np.ndarray:
    """Number the documents of every row from 0: int64 [rows, s], from `document_lengths` of each row."""
    return np.stack([np.repeat(np.arange(len(of_row)), of_row) for of_row in lengths])


def position_ids(lengths: Sequence[np.ndarray]) -> np.ndarray:
    """Count the tokens of every document from 0: int64 [rows, s], from `document_lengths` of each row."""
    return np.stack([np.concatenate([np.arange(length) for length in of_row]) for of_row in lengths])
