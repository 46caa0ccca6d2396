"""Weights in another dtype."""

import torch

from megatron_ext.checkpoint.read import Weights


class CastWeights:
    """`Weights` in another dtype."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        self._weights = weights
        self.shapes, self.dtypes = weights.shapes, dict.fromkeys(weights.dtypes, dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._weights.read_rows(name, start, stop).to(self.dtypes[name])
