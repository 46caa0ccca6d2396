"""Parameters that stay on disk: modules use them as they are written, and a piece at a time is in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces


class StoredWeight(torch.Tensor):
    """A weight of some `Weights`, which takes part in computations in float32, on the CPU, without gradients.

    Look-ups read the rows that are asked for, and products go through the rows a piece of at most 64 MiB after the
    other; any other operation reads the weight whole and forgets it again.
    """

    weights: Weights
    name: str

    @staticmethod
    def __new__(cls, weights: Weights, name: str) -> "StoredWeight":
        shape = weights.shapes[name]
        made: StoredWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.weights, made.name = weights, name
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if _only_describes(func):
                return func(*args, **(kwargs or {}))
            if func is torch.Tensor.to:
                return args[0]
            if func is F.linear and isinstance(args[1], cls):
                return args[1]._product(*args, **(kwargs or {}))
            if func is F.embedding and isinstance(args[1], cls):
                return args[1]._rows(args[0])
            whole = [arg.read() if isinstance(arg, cls) else arg for arg in args]
            options = {name: arg.read() if isinstance(arg, cls) else arg for name, arg in (kwargs or {}).items()}
            return func(*whole, **options)

    def read(self) -> torch.Tensor:
        """The whole weight."""
        whole = torch.empty(self.weights.shapes[self.name])
        for start, stop in row_pieces(self.weights, self.name):
            whole[start:stop] = self.weights.read_rows(self.name, start, stop)
        return whole

    def _product(self, x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        pieces = (self.weights.read_rows(self.name, *rows).float() for rows in row_pieces(self.weights, self.name))
        y = torch.cat([F.linear(x, piece) for piece in pieces], dim=-1)
        return y if bias is None else y + (bias.read() if isinstance(bias, StoredWeight) else bias)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        distinct, places = ids.unique(return_inverse=True)
        rows = torch.cat([self.weights.read_rows(self.name, i, i + 1) for i in distinct.tolist()])
        return F.embedding(places, rows.float())


def _only_describes(func: Any) -> bool:
    """Whether a function reads an attribute of a tensor that needs no values."""
    return getattr(func, "__name__", "") in ("__get__", "dim", "size", "numel") and func is not _TRANSPOSED


_TRANSPOSED = torch.Tensor.T.__get__  # type: ignore[attr-defined]


def put_stored_weights(model: nn.Module, find: Callable[[str, torch.Size], StoredWeight]) -> None:
    """Replace every parameter of a model on the meta device by the stored weight found for its name and shape."""
    for path, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path}.{own}" if path else own
            module._parameters[own] = find(name, parameter.shape)  # type: ignore[assignment]
