"""What is converted: a model's shape and its weights, to be read as they are needed.

A conversion is a chain of `Weights`: the source's, wrapped once for everything that changes on the way.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ext.checkpoint.read import Weights
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on its way.

    Attributes:
        weights: by our global names; all that `model` has, and no others.
        token_ids: config.json's ids of special tokens, where the source knows them.
        tokenizer: folder of the tokenizer that lies beside the weights, if one does.
        origin: where it comes from, for the manifest.
        merged_adapters: how many low-rank adapters of the source have become part of the weights.
    """

    model: ModelConfig
    weights: Weights
    token_ids: dict[str, Any]
    tokenizer: Path | None
    origin: str
    merged_adapters: int = 0

    def check(self, where: str, description: str) -> "Source":
        """Itself, or RequestError naming the first weight that is missing, left over or of another shape.

        where: starts the message; description: the file that says what the shapes should be.
        """
        wanted, found = parameter_shapes(self.model), self.weights.shapes
        for problem, names in (
            ("lacks", wanted.keys() - found.keys()),
            ("has an unknown", found.keys() - wanted.keys()),
        ):
            if names:
                raise RequestError(f"{where}: {problem} weight {min(names)} ({len(names)} in all)")
        for name, shape in wanted.items():
            if found[name] != shape:
                raise RequestError(f"{where}: {name} is {tuple(found[name])}, {description} asks for {tuple(shape)}")
        return self


class CastWeights:
    """`Weights` in another dtype."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        self._weights = weights
        self.shapes, self.dtypes = weights.shapes, dict.fromkeys(weights.dtypes, dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._weights.read_rows(name, start, stop).to(self.dtypes[name])


class WatchedWeights:
    """`Weights` that move a bar of bytes as they are read."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self.shapes, self.dtypes = weights.shapes, weights.dtypes
        self.bar = tqdm(total=sum(bytes_of(weights, name) for name in self.shapes), unit="B", unit_scale=True)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self._weights.read_rows(name, start, stop)
        self.bar.update(rows.nbytes)
        return rows


def bytes_of(weights: Weights, name: str) -> int:
    return weights.shapes[name].numel() * weights.dtypes[name].itemsize
