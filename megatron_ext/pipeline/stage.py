"""A stage for torch's schedules whose data parallelism and receive buffers are ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from megatron_ext.zero import DataParallel


class _Opaque(nn.Module):
    """Hides that the stage is an FSDP module: torch's schedules would gather and reduce whole stages themselves."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.module(*args, **kwargs)


class Stage(PipelineStage):
    """A stage that tells its data parallelism about every backward pass, whole or in halves.

    room(device): an uninitialised tensor for what a neighbour hands over for one microbatch. torch keeps such room
    for every microbatch of a step; here it exists from the receive to the backward pass, so that 1F1B holds as many
    as it has microbatches in flight.
    """

    def __init__(self, data_parallel: DataParallel, room: Callable[[torch.device], torch.Tensor], **kwargs: Any):
        super().__init__(submodule=_Opaque(data_parallel.module), **kwargs)
        self.data_parallel, self.room = data_parallel, room

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        if backward_type == "full":
            grad = None if bwd_kwargs["output_grads"] is None else _only(bwd_kwargs["output_grads"])
            self.data_parallel.backward(_only(bwd_kwargs["stage_output"]), grad, last_backward)
            return tuple(_take_gradient(value) for value in bwd_kwargs["input_values"]), None
        assert isinstance(self.data_parallel, DataParallel)  # DeepSpeed's engine runs whole backward passes only
        self.data_parallel.before_backward(backward_type, last_backward)
        result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        self.data_parallel.after_backward(backward_type, last_backward)
        return result

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing left to do: gradients were reduced as the ZeRO stage says, and the loss carries the scale."""

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            self._give_back(infos)
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            self._give_back(infos)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        for info in _received(self.args_recv_info[fwd_chunk_id]):
            info.buffer = self.room(self.device).requires_grad_(self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        for info in _received(self.grad_recv_info.get(bwd_chunk_id, ())):
            info.buffer = self.room(self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if loss is not None and full_backward:
            loss.detach_()  # torch keeps every loss until the step ends, and its graph would keep the stage's input
        self._give_back(self.args_recv_info[bwd_chunk_id])
        self._give_back(self.grad_recv_info.get(bwd_chunk_id, ()))

    def _give_back(self, infos: Sequence[Any]) -> None:
        for info in _received(infos):
            info.buffer = torch.empty(0, device=self.device)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """torch 2.11 greets its neighbours before the first batch; gloo cannot send to itself (V-shaped schedules)."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def _only(value: Any) -> torch.Tensor:
    """A stage hands over one tensor, which torch sometimes wraps."""
    if isinstance(value, torch.Tensor):
        return value
    (tensor,) = value
    return tensor


def _take_gradient(value: Any) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor):
        return None
    grad, value.grad = value.grad, None
    return grad


def _received(infos: Sequence[Any]) -> list[Any]:
    """Of torch's notes on a stage's inputs, those that come from another stage."""
    return [info for info in infos if getattr(info, "buffer", None) is not None]
