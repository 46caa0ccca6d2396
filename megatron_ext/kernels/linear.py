"""Matrix products. The column-parallel one has its input collective inside, so that communication
hides behind compute.

Forward: (gather the sequence,) y_i = x W_i^T for every weight that reads the same input (q, k and v; gate and up).
Backward: dx = sum_i dy_i W_i is reduced over tp while the weight gradients are computed. Under sequence
parallelism only this rank's slice of x is kept for backward and gathered again, as in arXiv 2205.05198, 4.2.2: that
begins before dx is computed, and hides behind it. One group's messages travel in the order in which they are begun,
so that the weight gradients wait for the first alone.

Under zero-bubble schedules autograd visits the node twice, once for dx and once for the dW; each visit does its
own half only.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext.tensor_parallel.collectives import (
    gather_sequence,
    leave,
    scatter_sequence_sum,
    start_gather_sequence,
)
from megatron_ext.tensor_parallel.context import TensorParallel
from megatron_ext.torch_private import will_run


def _wanted(ctx: Any, index: int) -> bool:
    """Whether this backward pass goes on to tensor input `index` (autograd.grad on a subset may not)."""
    node = ctx.next_functions[index][0]
    return node is not None and will_run(node)


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tp = tp
        # frozen weights have no gradient to compute from x
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *weights)
        full = gather_sequence(x, tp) if tp.sequence_parallel else x
        return tuple(F.linear(full, w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tp: TensorParallel = ctx.tp
        x, *weights = ctx.saved_tensors
        want_x = _wanted(ctx, 0)
        want_w = [_wanted(ctx, 1 + i) for i in range(len(weights))]
        rows = [grad.flatten(0, 1) for grad in grads]

        gathered = None
        if any(want_w) and tp.sequence_parallel:
            gathered = start_gather_sequence(x, tp)
        dx, work = None, None
        if want_x:
            dx = rows[0] @ weights[0]
            for row, weight in zip(rows[1:], weights[1:], strict=True):
                dx.addmm_(row, weight)
            dx = dx.view(*grads[0].shape[:-1], -1)
            if tp.sequence_parallel:
                dx, work = scatter_sequence_sum(dx, tp, async_op=True)
            else:
                work = dist.all_reduce(dx, group=tp.group, async_op=True)
        dw: list[torch.Tensor | None] = [None] * len(weights)
        if any(want_w):
            full = (x if gathered is None else gathered()).flatten(0, 1)
            gathered = None  # and what it holds
            dw = [row.T @ full if want else None for row, want in zip(rows, want_w, strict=True)]
        if work is not None:
            work.wait()
        return (dx, None, *dw)


def column_parallel_linear(x: torch.Tensor, weights: list[torch.Tensor], tp: TensorParallel) -> list[torch.Tensor]:
    """See `Products.column_parallel`."""
    if tp.size == 1:
        return [F.linear(x, w) for w in weights]
    return list(_ColumnParallelLinear.apply(x, tp, *weights))


def row_parallel_linear(x: torch.Tensor, weight: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """See `Products.row_parallel`."""
    return leave(F.linear(x, weight), tp)


def row_parallel_temporary(
    inputs: float, outputs: float, weight: float, element: int, cast: int, sequence_parallel: bool
) -> float:
    """The gradients of its weight and of its input; and the gathered one of its output, as it comes and in order."""
    gathered = 2 * outputs * element if sequence_parallel else 0
    return inputs * element + weight * (element + cast) + gathered
