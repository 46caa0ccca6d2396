"""Weights whose embedding and head are read as if the vocabulary had grown before they were stored."""

import functools

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.models.expand import Expansion, NewRows
from megatron_ext.models.names import EMBEDDING, HEAD

VOCABULARY_MATRICES = (EMBEDDING, HEAD)


class ResizedWeights:
    """`Weights` of a model with a larger vocabulary: old rows as they are stored, then new ones.

    weights: of the model with `expansion.old_size` rows; a tied model has one of the two matrices.
    progress: show a bar while the new rows of a matrix are computed.
    """

    def __init__(self, weights: Weights, expansion: Expansion, progress: bool = False):
        self._weights, self._expansion, self._progress = weights, expansion, progress
        self._new: dict[str, NewRows] = {}
        self.dtypes = weights.dtypes
        self.shapes = {
            name: torch.Size([expansion.new_size, *shape[1:]]) if name in VOCABULARY_MATRICES else shape
            for name, shape in weights.shapes.items()
        }

    def new_rows(self, name: str) -> NewRows:
        """The rows that `name`, one of VOCABULARY_MATRICES, gets. Computed once."""
        if name not in self._new:
            read = functools.partial(self._weights.read_rows, name)
            self._new[name] = self._expansion.new_rows(name, read, self._progress)
        return self._new[name]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        old_size = self._expansion.old_size
        if name not in VOCABULARY_MATRICES or stop <= old_size:
            return self._weights.read_rows(name, start, stop)
        new = self.new_rows(name).values[max(start - old_size, 0) : stop - old_size]
        return new if start >= old_size else torch.cat([self._weights.read_rows(name, start, old_size), new])
