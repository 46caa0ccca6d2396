"""Weights read in whole pieces, for what asks for a few rows here and a few there."""

import functools

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces

_KEPT = 4  # a fused query, key and value matrix is made of three weights


class KeptPieces:
    """`Weights` of which a piece (`row_pieces`) is read whole where a part of it is asked for; the last four are kept.

    A matrix whose rows alternate between others' is made of many short ranges. Without this, every one of them costs
    the reading of a whole stored piece.
    """

    def __init__(self, weights: Weights):
        self._weights = weights
        self.shapes, self.dtypes = weights.shapes, weights.dtypes
        self._piece = functools.lru_cache(maxsize=_KEPT)(weights.read_rows)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if (start, stop) in row_pieces(self._weights, name):
            return self._weights.read_rows(name, start, stop)
        parts = [
            self._piece(name, low, high)[max(start - low, 0) : stop - low]
            for low, high in row_pieces(self._weights, name)
            if low < stop and start < high
        ]
        if not parts:
            return self._weights.read_rows(name, start, stop)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
