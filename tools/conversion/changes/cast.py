"""Weights in another dtype."""

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.errors import RequestError


class CastWeights:
    """`Weights` in another dtype. Raises RequestError, while reading, for a value that it cannot hold."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        self._weights = weights
        self.shapes, self.dtypes = weights.shapes, dict.fromkeys(weights.dtypes, dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self._weights.read_rows(name, start, stop)
        cast = rows.to(self.dtypes[name])
        if not torch.equal(cast.isfinite(), rows.isfinite()):
            dtype = str(self.dtypes[name]).removeprefix("torch.")
            largest = rows.nan_to_num(posinf=0, neginf=0).abs().max().item()
            raise RequestError(f"--dtype {dtype}: {name} has values that it cannot hold, such as {largest:.3g}")
        return cast
