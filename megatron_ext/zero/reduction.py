"""Gradients on their way between data-parallel ranks: what travels in one message, and in which dtype."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.torch_private import DefaultReduceScatter, foreach_copy_

_BUCKET_ELEMENTS = 1 << 25


class Bfloat16ReduceScatter(DefaultReduceScatter):
    """FSDP's reduce-scatter with messages in bfloat16, for gradients that are accumulated and kept in float32.

    (FSDP asked to reduce in bfloat16 would accumulate in it too.) FSDP casts to and from the buffers that it gets
    here: the reduce-scatter's, and what replicas of hybrid sharding then all-reduce. `partial`: there is no
    all-reduce after this microbatch, only a sum of several; that is float32, and rounded once, before it travels.
    """

    partial = False

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return super().allocate(size, dtype=dtype if self.partial else torch.bfloat16, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        if not self.partial:
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
        received = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        work = super().__call__(received, input_tensor.bfloat16(), group, op)
        output_tensor.copy_(received)
        return work


def all_reduce(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup, dtype: torch.dtype | None = None) -> None:
    """Sum every tensor over the group, in place; small ones travel together, all as `dtype` if it is given."""
    bucket: list[torch.Tensor] = []

    def flush() -> None:
        parts = [t.flatten().to(dtype or t.dtype) for t in bucket]
        if parts:
            sent = parts[0] if len(parts) == 1 else torch.cat(parts)
            dist.all_reduce(sent, group=group)
            if sent.data_ptr() != bucket[0].data_ptr():
                foreach_copy_([t.view(-1) for t in bucket], list(sent.split([t.numel() for t in bucket])))
        bucket.clear()

    for tensor in tensors:
        if sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET_ELEMENTS:
            flush()
        bucket.append(tensor)
    flush()
