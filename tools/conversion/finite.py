"""Weights that are looked at while they are read: NaN or an infinite value in a model is named, not converted."""

import torch

from megatron_ext.checkpoint.finite import count_not_finite, not_finite
from megatron_ext.checkpoint.read import Weights
from megatron_ext.errors import RequestError

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
