"""A stage for torch's schedules whose data parallelism and receive buffers are ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_ext.torch_private import PrivateHooksStage, only_tensor, received, take_gradient
from megatron_ext.zero import DataParallelStage


class _Opaque(nn.Module):
    """Hides that the stage is an FSDP module: torch's schedules would gather and reduce whole stages themselves."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.module(*args, **kwargs)


class Stage(PrivateHooksStage):
    """A stage that tells its data parallelism about every backward pass, whole or in halves.

    room(device): an uninitialised tensor for what a neighbour hands over for one microbatch. torch keeps such room
    for every microbatch of a step; here it exists from the receive to the backward pass, so that 1F1B holds as many
    as it has microbatches in flight.
    """

    def __init__(self, data_parallel: DataParallelStage, room: Callable[[torch.device], torch.Tensor], **kwargs: Any):
        super().__init__(submodule=_Opaque(data_parallel.module), **kwargs)
        self.data_parallel, self.room = data_parallel, room

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        if backward_type == "full":
            grads = bwd_kwargs["output_grads"]
            grad = None if grads is None else only_tensor(grads)
            self.data_parallel.backward(only_tensor(bwd_kwargs["stage_output"]), grad, last_backward)
            return tuple(map(take_gradient, bwd_kwargs["input_values"])), None
        self.data_parallel.before_backward(backward_type, last_backward)
        result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        self.data_parallel.after_backward(backward_type, last_backward)
        return result

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing left to do: gradients were reduced as the ZeRO stage says, and the loss carries the scale."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        for info in received(self.args_recv_info[fwd_chunk_id]):
            info.buffer = self.room(self.device).requires_grad_(self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        for info in received(self.grad_recv_info.get(bwd_chunk_id, ())):
            info.buffer = self.room(self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if loss is not None and full_backward:
            loss.detach_()  # torch keeps every loss until the step ends, and its graph would keep the stage's input
        self.give_back(self.args_recv_info[bwd_chunk_id])
        self.give_back(self.grad_recv_info.get(bwd_chunk_id, ()))

    def give_back(self, infos: Sequence[Any]) -> None:
        for info in received(infos):
            info.buffer = torch.empty(0, device=self.device)
