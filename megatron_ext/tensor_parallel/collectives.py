"""The conjugate collectives of tensor parallelism: what is an all-reduce forward is an identity backward.

    leave   Megatron's g: all-reduce / identity; with sequence parallelism g-bar: reduce-scatter / all-gather

Its conjugate, Megatron's f (entering a parallel region), is part of `kernels.linear.column_parallel_linear`, where it
overlaps with the weight gradient. Sequence-parallel activations are [batch, sequence / tp, hidden].
Source: Shoeybi et al., arXiv 1909.08053, section 3; Korthikanti et al., arXiv 2205.05198, section 4.2.2.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.tensor_parallel.context import TensorParallel

if hasattr(dist, "all_gather_single"):  # torch 2.13's names
    all_gather, reduce_scatter = dist.all_gather_single, dist.reduce_scatter_single
else:
    all_gather, reduce_scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def gather_sequence(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """[b, s/tp, ...] on every rank -> [b, s, ...]."""
    return start_gather_sequence(x, tp)()


def start_gather_sequence(x: torch.Tensor, tp: TensorParallel) -> Callable[[], torch.Tensor]:
    """Begin `gather_sequence`; what is returned waits for it and gives its result."""
    parts = x.new_empty((tp.size * x.shape[0], *x.shape[1:]))
    work = all_gather(parts, x.contiguous(), group=tp.group, async_op=True)

    def finish() -> torch.Tensor:
        if work is not None:
            work.wait()
        return parts.unflatten(0, (tp.size, -1)).transpose(0, 1).flatten(1, 2)

    return finish


def scatter_sequence_sum(
    x: torch.Tensor, tp: TensorParallel, async_op: bool = False
) -> tuple[torch.Tensor, dist.Work | None]:
    """Sum [b, s, ...] over the ranks and keep this rank's [b, s/tp, ...]."""
    parts = x.unflatten(1, (tp.size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    out = torch.empty_like(parts[: x.shape[0]])
    work = reduce_scatter(out, parts, group=tp.group, async_op=async_op)
    return out, work


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        ctx.mark_dirty(x)  # in place: x is a fresh product that nobody else reads
        dist.all_reduce(x, group=tp.group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        ctx.tp = tp
        return scatter_sequence_sum(x, tp)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_sequence(grad, ctx.tp), None


def leave(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Sum the partial results [b, s, h] of a row-parallel product; [b, s/tp, h] under sequence parallelism."""
    if tp.size == 1:
        return x
    return _ReduceScatterSequence.apply(x, tp) if tp.sequence_parallel else _Reduce.apply(x, tp)
