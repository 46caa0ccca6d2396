"""Linear layers and the embedding, cut over the tensor-parallel group.

Constructed with *global* shapes; `storage.distribute_parameters` cuts them by `tp_shard_dims`. Activations are
[batch, sequence, hidden], or [batch, sequence / tp, hidden] between parallel regions under sequence parallelism.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ext.tensor_parallel.collectives import leave
from megatron_ext.tensor_parallel.context import TensorParallel
from megatron_ext.tensor_parallel.storage import local, tp_shard_range


class Products(Protocol):
    """The matrix products of the layers here. Whoever builds a layer gives it some (`megatron_ext.kernels`)."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [..., in], weight [out, in] -> [..., out], in x's dtype."""

    def column_parallel(self, x: torch.Tensor, weights: list[torch.Tensor], tp: TensorParallel) -> list[torch.Tensor]:
        """x [b, s or s/tp, h] times each local weight [out_i/tp, h] -> [b, s, out_i/tp] each, in x's dtype."""

    def row_parallel(self, x: torch.Tensor, weight: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        """x [b, s, in/tp], local weight [out, in/tp] -> their sum over tp, [b, s or s/tp, out], in x's dtype."""


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features cut over tp. Call through `column_parallel`.

    With `rows` every rank keeps the whole weight and uses only those: for key and value heads that are fewer than
    the ranks. Its gradient is then a sum over the ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TensorParallel,
        products: Products,
        bias: bool = False,
        rows: slice | None = None,
    ):
        super().__init__()
        self.tp, self.products = tp, products
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.lora: nn.Module | None = None  # see lora.add_adapters
        self.tp_shard_dims = {"weight": 0, "bias": 0} if rows is None else {}
        self.tp_shares: tuple[str, ...] = () if rows is None else ("weight", "bias")

    def local_weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self._local(self.weight, dtype)

    def complete(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add to x W^T what else there is: the bias, an adapter."""
        if self.bias is not None:
            y = y + self._local(self.bias, y.dtype)
        return y if self.lora is None else y + self.lora(x)

    def _local(self, param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        whole = local(param, dtype)
        return whole if self.rows is None else whole[self.rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return column_parallel(x, self)[0]


def column_parallel(x: torch.Tensor, *layers: ColumnParallelLinear) -> list[torch.Tensor]:
    """Several column-parallel layers of one input: x is gathered once, its gradient reduced once."""
    first, weights = layers[0], [layer.local_weight(x.dtype) for layer in layers]
    outputs = first.products.column_parallel(x, weights, first.tp)
    return [layer.complete(y, x) for layer, y in zip(layers, outputs, strict=True)]


class RowParallelLinear(nn.Module):
    """y = sum over tp of x_r W_r^T, + b: the input features are cut over tp, the output is whole again."""

    tp_shard_dims = {"weight": 1}

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, products: Products, bias: bool = False):
        super().__init__()
        self.tp, self.products = tp, products
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.lora: nn.Module | None = None
        self.tp_shares = ("bias",) if tp.sequence_parallel else ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.products.row_parallel(x, local(self.weight, x.dtype), self.tp)
        if self.bias is not None:  # after the sum, once; under sequence parallelism each rank sees its own tokens
            y = y + local(self.bias, y.dtype)
        return y if self.lora is None else y + self.lora(x)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary cut over tp, any size, nothing padded.

    ids [b, s] int64 -> [b, s, h] (or [b, s/tp, h]) in `dtype`.
    """

    tp_shard_dims = {"weight": 0}

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight = local(self.weight, self.weight.dtype)
        if self.tp.size == 1:
            return F.embedding(ids, weight).to(dtype)
        start, stop = tp_shard_range(self.vocab_size, self.tp.size, self.tp.rank)
        mine = (ids >= start) & (ids < stop)
        rows = F.embedding((ids - start).clamp(0, stop - start - 1), weight)
        return leave((rows * mine[..., None]).to(dtype), self.tp)


class Replicated(nn.Module):
    """Base of layers whose weights every tp rank holds whole and applies to its own part of the activations.

    That part is its slice of the sequence, under sequence parallelism; or always its own heads (`of_heads`).
    """

    def __init__(self, tp: TensorParallel, of_heads: bool = False):
        super().__init__()
        self.tp = tp
        self._sees_a_part = tp.size > 1 and (of_heads or tp.sequence_parallel)

    @property
    def tp_shares(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_parameters(recurse=False)) if self._sees_a_part else ()


class PositionEmbedding(Replicated):
    """A learned row for every position, after `offset` rows that no position uses."""

    def __init__(self, positions: int, hidden_size: int, offset: int, tp: TensorParallel):
        super().__init__(tp)
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(offset + positions, hidden_size))

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[s] or [b, s] int64 -> [s, h] or [b, s, h], of this rank's slice of the sequence if it is cut."""
        if self.tp.sequence_parallel:
            positions = positions.chunk(self.tp.size, dim=-1)[self.tp.rank]
        return F.embedding(positions + self.offset, local(self.weight, self.weight.dtype)).to(dtype)
