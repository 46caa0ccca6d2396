"""`Weights` that are changed or looked at while they are read: cast, merged with adapters, refused where not finite."""

import functools

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.verify import count_not_finite, not_finite
from megatron_ext.errors import RequestError
from megatron_ext.tensor_parallel import LoraConfig, adapter_product


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


_NAMED = 3


class FiniteWeights:
    """`Weights` of finite values. Raises RequestError, while reading, with the names of those that have others.

    where: starts the message.
    """

    def __init__(self, weights: Weights, where: str):
        self._weights, self._where = weights, where
        self.shapes, self.dtypes = weights.shapes, weights.dtypes

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self._weights.read_rows(name, start, stop)
        if not rows.isfinite().all():
            raise RequestError(self._describe())
        return rows

    def _describe(self) -> str:
        """All that is wrong, of which there may be much: reads everything once more."""
        counts = {name: count_not_finite(self._weights, name) for name in self.shapes}
        bad = [name for name, count in counts.items() if count]
        named = "; ".join(f"{name} {not_finite(counts[name], self._weights, name)}" for name in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more tensors" if len(bad) > _NAMED else ""
        return f"{self._where}: {named}{more}: such a model is of no use"
