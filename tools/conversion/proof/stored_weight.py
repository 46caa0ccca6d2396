"""Parameters that stay on disk: modules compute with them as usual, and a piece of one at a time is in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces
from megatron_ext.torch_private import DisableTorchFunctionSubclass, wrapper_of

_TRANSPOSED = torch.Tensor.T.__get__  # type: ignore[attr-defined]


class StoredWeight(torch.Tensor):
    """A weight of some `Weights` that takes part in computations: float32, on the CPU, without gradients.

    A look-up reads the rows that are asked for, and a product goes through the rows a piece after the other; any other
    operation reads the weight whole and forgets it again.
    """

    weights: Weights
    stored_name: str

    @staticmethod
    def __new__(cls, weights: Weights, name: str) -> "StoredWeight":
        made: StoredWeight = wrapper_of(cls, weights.shapes[name], torch.float32)
        made.weights, made.stored_name = weights, name
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        with DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") == "__get__" and func != _TRANSPOSED:  # a shape, a dtype, a device
                return func(*args, **options)
            if func is torch.Tensor.to:  # it is in float32 already
                return args[0]
            if func in (F.linear, F.embedding) and isinstance(args[1], cls):
                return (args[1]._product if func is F.linear else args[1]._rows)(args[0], *args[2:], **options)
            return func(*map(_read, args), **{name: _read(value) for name, value in options.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{func} reached a weight that is on disk")

    def read(self) -> torch.Tensor:
        """Read the whole weight."""
        whole = torch.empty(self.weights.shapes[self.stored_name])
        for start, stop in row_pieces(self.weights, self.stored_name):
            whole[start:stop] = self.weights.read_rows(self.stored_name, start, stop)
        return whole

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        pieces = (
            self.weights.read_rows(self.stored_name, *rows).float()
            for rows in row_pieces(self.weights, self.stored_name)
        )
        y = torch.cat([F.linear(x, piece) for piece in pieces], dim=-1)
        return y if bias is None else y + _read(bias)

    def _rows(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        distinct, places = ids.unique(return_inverse=True)
        rows = torch.cat([self.weights.read_rows(self.stored_name, i, i + 1) for i in distinct.tolist()])
        return F.embedding(places, rows.float())


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, StoredWeight) else value
