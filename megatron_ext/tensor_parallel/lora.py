"""Low-rank adapters beside the parallel linear layers (Hu et al., arXiv 2106.09685).

    y += alpha / rank * dropout(x) A^T B        A [rank, in], B [rank, out], both stored as written here

What crosses ranks is the rank-wide product x A^T, never x or y. B has the rank first, so that ZeRO may cut that
dimension whatever the number of ranks; peft's lora_B is its transpose. B starts at zero: the model starts unchanged.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ext.errors import RequestError
from megatron_ext.option import option
from megatron_ext.tensor_parallel.collectives import leave
from megatron_ext.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ext.tensor_parallel.storage import local

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Defaults: those published with Chinese-LLaMA's second stage."""

    lora_rank: int = option(8, "with --train-only lora: rank of the adapters")
    lora_alpha: float = option(32.0, "with --train-only lora: adapters are scaled by this / rank")
    lora_dropout: float = option(0.05, "with --train-only lora: share of an adapter's inputs that are dropped")
    lora_target_modules: tuple[str, ...] = option(
        TARGETS, "with --train-only lora: linear layers that get an adapter", metavar="NAME"
    )

    def validate(self) -> None:
        """Raise RequestError where there is no such adapter."""
        if self.lora_rank < 1:
            raise RequestError(f"--lora-rank {self.lora_rank}: must be at least 1")
        if self.lora_alpha <= 0:
            raise RequestError(f"--lora-alpha {self.lora_alpha}: must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise RequestError(f"--lora-dropout {self.lora_dropout}: must be in [0, 1)")
        unknown = set(self.lora_target_modules) - set(TARGETS)
        if unknown or not self.lora_target_modules:
            raise RequestError(f"--lora-target-modules {' '.join(sorted(unknown))}: give some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.lora_rank


class _Adapter(nn.Module):
    def __init__(self, linear: ColumnParallelLinear | RowParallelLinear, config: LoraConfig):
        super().__init__()
        self.tp, self.products = linear.tp, linear.products
        self.scale, self.dropout = config.scale, config.lora_dropout
        out_features, in_features = linear.weight.shape
        self.a = nn.Parameter(torch.empty(config.lora_rank, in_features, dtype=linear.weight.dtype))
        self.b = nn.Parameter(torch.empty(config.lora_rank, out_features, dtype=linear.weight.dtype))

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        return self.products.linear(dropped, local(self.a, x.dtype)) * self.scale


def dropout_bytes(elements: float, element: int, device_type: str) -> float:
    """What an adapter keeps for its backward pass: its own dropped input, and what was dropped. element: bytes of one.

    torch's mask is of bools; on a CPU it is of the input's dtype.
    """
    return elements * (element + (torch.bool.itemsize if device_type == "cuda" else element))


class ColumnAdapter(_Adapter):
    """x [b, s, in] ([b, s/tp, in] under sequence parallelism) -> [b, s, out/tp].

    Every tp rank must drop the same elements of a replicated x: give the ranks of a group one random state.
    """

    def __init__(self, linear: ColumnParallelLinear, config: LoraConfig):
        super().__init__(linear, config)
        self.rows = linear.rows
        self.tp_shard_dims = {"b": 1} if linear.rows is None else {}
        self.tp_shares = ("a",) * self.tp.sequence_parallel + ("b",) * (linear.rows is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self._down(x)
        b = local(self.b, x.dtype)
        return self.products.column_parallel(low, [(b if self.rows is None else b[:, self.rows]).T], self.tp)[0]


class RowAdapter(_Adapter):
    """x [b, s, in/tp] -> [b, s, out] ([b, s/tp, out] under sequence parallelism)."""

    tp_shard_dims = {"a": 1}

    def __init__(self, linear: RowParallelLinear, config: LoraConfig):
        super().__init__(linear, config)
        self.tp_shares = ("b",) if self.tp.sequence_parallel else ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = leave(self._down(x), self.tp)
        return self.products.linear(low, local(self.b, x.dtype).T)


def adapter_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """What an adapter adds to the weight beside it: A [rank, in] and B [rank, out] -> [out, in]."""
    return scale * (b.T @ a)


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put an adapter, `NAME.lora`, beside every linear layer of `model` whose own name is a target."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in config.lora_target_modules:
            if isinstance(module, ColumnParallelLinear):
                module.lora = ColumnAdapter(module, config)
            elif isinstance(module, RowParallelLinear):
                module.lora = RowAdapter(module, config)
