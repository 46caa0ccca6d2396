"""Cross entropy over logits whose vocabulary is cut over tp: the full logits never exist on one rank.

Source: Shoeybi et al., arXiv 1909.08053, section 3 (fused parallel cross entropy). Two all-reduces of [b, s]:
the maximum, and the sum of exponentials with the target's logit.

Beside the logits there is one tensor of their size in float32 (none, if they are that wide): the exponentials, which
are kept, and of which the backward pass makes the gradient.
"""

from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.kernels.backend import LossBytes
from megatron_ext.kernels.linear import column_parallel_linear
from megatron_ext.tensor_parallel.context import TensorParallel
from megatron_ext.tensor_parallel.storage import tp_shard_range


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, start: int, tp: TensorParallel) -> torch.Tensor:
        accumulate = torch.promote_types(logits.dtype, torch.float32)  # float64 stays, half precision does not
        shifted = logits.flatten(0, -2).to(accumulate)  # wide logits are overwritten
        peak = shifted.amax(-1, keepdim=True)
        if tp.size > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=tp.group)
        shifted.sub_(peak)
        index = labels.flatten() - start
        mine = (index >= 0) & (index < shifted.shape[-1])
        index = index.clamp(0, shifted.shape[-1] - 1)
        target = shifted.gather(-1, index[:, None])[:, 0] * mine
        exp = shifted.exp_()
        sums = torch.stack([exp.sum(-1), target])
        if tp.size > 1:
            dist.all_reduce(sums, group=tp.group)
        ctx.save_for_backward(sums[0], index, mine)
        ctx.exp, ctx.shape, ctx.dtype = exp, logits.shape, logits.dtype
        total, target = sums.view(2, *labels.shape)
        return total.log() - target  # a tensor of its own: of a view FSDP warns

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.exp is None:
            raise RuntimeError("the gradient of the cross entropy is made in place: it can be taken only once")
        total, index, mine = ctx.saved_tensors
        probability, ctx.exp = ctx.exp, None
        probability.div_(total[:, None])
        probability.scatter_add_(-1, index[:, None], -mine.to(probability.dtype)[:, None])
        probability.mul_(grad.flatten()[:, None])
        return probability.to(ctx.dtype).view(ctx.shape), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp: TensorParallel
) -> torch.Tensor:
    """Loss of every token, in at least float32. Overwrites float32 and float64 logits; differentiable once.

    logits [b, s, this rank's share of vocab_size], labels [b, s] int64 with ids of the whole vocabulary -> [b, s].
    """
    start, _ = tp_shard_range(vocab_size, tp.size, tp.rank)
    return _VocabParallelCrossEntropy.apply(logits, labels, start, tp)


class VocabParallelLinearCrossEntropy:
    """The head's product, and the cross entropy of its logits."""

    moved_bytes = (30, 22)

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp: TensorParallel
    ) -> torch.Tensor:
        (logits,) = column_parallel_linear(hidden, [weight], tp)
        return vocab_parallel_cross_entropy(logits, labels, vocab_size, tp)

    def kept(self, tokens: float, logits: float, element: int, wide: int) -> LossBytes:
        """The exponentials, and of every token their sum, its label and whether that is here."""
        return LossBytes(
            tokens=tokens * (wide + torch.int64.itemsize + torch.bool.itemsize),
            logits=logits * wide,
            deferred=logits * element,
            temporary=logits * (element if element < wide else 0),
        )
