"""Weights into which low-rank adapters are merged as they are read: W + alpha / rank (B^T A), arXiv 2106.09685."""

import functools

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.tensor_parallel import LoraConfig, adapter_product

_A, _B = ".lora.a", ".lora.b"


class MergedWeights:
    """`Weights` without adapters. Sums are computed in float32 (float64 for float64) and rounded to the weight's dtype.

    weights: of a model with adapters as `config` describes them.
    """

    def __init__(self, weights: Weights, config: LoraConfig):
        self._weights, self._scale = weights, config.scale
        names = [name for name in weights.shapes if not name.endswith((_A, _B))]
        self.shapes = {name: weights.shapes[name] for name in names}
        self.dtypes = {name: weights.dtypes[name] for name in names}
        self.adapters = sum(name.endswith(_A) for name in weights.shapes)
        self._read_whole = functools.lru_cache(maxsize=2)(self._read)  # a weight's A and B, while its rows are read

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self._weights.read_rows(name, start, stop)
        adapter = name.removesuffix(".weight")
        if adapter + _A not in self._weights.shapes:
            return rows
        dtype = torch.promote_types(rows.dtype, torch.float32)
        a, b = (self._read_whole(adapter + part).to(dtype) for part in (_A, _B))
        return (rows.to(dtype) + adapter_product(a, b[:, start:stop], self._scale)).to(rows.dtype)

    def _read(self, name: str) -> torch.Tensor:
        return self._weights.read_rows(name, 0, self._weights.shapes[name][0])
