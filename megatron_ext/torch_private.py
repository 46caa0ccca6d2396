"""Everything that this project uses of torch under a name that torch does not promise to keep.

Each name is there in torch 2.11 and in 2.13 (with which the tests run), but for where one of them is named. When torch
moves on, this is the file to go through; tests/megatron_ext/test_torch_private.py finds such names anywhere else.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.checkpoint import filesystem
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter as DefaultReduceScatter
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor, debug
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._utils import compute_global_tensor_info as compute_global_tensor_info
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)

StorageInfo = filesystem._StorageInfo  # where a piece of a checkpoint lies
PipelineSchedule = schedules._PipelineSchedule
forget_placements = debug._clear_sharding_prop_cache  # DTensor works them out once for every mesh, and equal ones

# Kernels over lists of tensors. torch documents them, underscore and all, as a beta feature.
foreach_copy_, foreach_mul_, foreach_norm = torch._foreach_copy_, torch._foreach_mul_, torch._foreach_norm


# DTensor


def spec_and_local(tensor: DTensor) -> tuple[DTensorSpec, torch.Tensor]:
    """How a DTensor is placed, and its local part, without the host time of `to_local` and its backward pass."""
    return tensor._spec, tensor._local_tensor


def with_spec(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
    """Make a DTensor of a local part, which is not looked at or moved. (`DTensor.from_local` would move what is
    offloaded to the device of the mesh.)"""
    return DTensor(local, spec, requires_grad=False)  # type: ignore[call-arg]


def placed_as(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """Make a DTensor of a local part, placed as `tensor` is."""
    return with_spec(local, tensor._spec)


# Modules and storages


def put_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give a module a tensor that is no nn.Parameter for one of its parameters."""
    module._parameters[name] = tensor  # type: ignore[assignment]


def storage_id(storage: torch.UntypedStorage) -> int:
    """Identify a storage, also one on the meta device, where all addresses are 0."""
    return storage._cdata


def offset_in_file(storage: torch.UntypedStorage) -> int | None:
    """Say where in its file the bytes of a storage begin that `torch.load` put on the device "meta"; None: nowhere.

    (Read as torch's GPUDirect Storage tutorial does.)
    """
    return storage._checkpoint_offset  # type: ignore[attr-defined]


def wrapper_of(cls: type[torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> Any:
    """Make a tensor of class `cls` that has no storage."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # type: ignore[attr-defined]


# Autograd


def will_run(node: Any) -> bool:
    """Whether the backward pass that is under way goes on to a node of the graph; a leaf's is one to run."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for
        return True


# FSDP


def finish_backward(module: nn.Module) -> None:
    """Do with every gradient what FSDP does after a backward pass. Split ones run none of its hooks, so call them."""
    state = fully_shard.state(module)  # type: ignore[attr-defined]
    for part in state._state_ctx.all_states:
        # a list in 2.13, one group in 2.11
        groups = part._fsdp_param_groups if hasattr(part, "_fsdp_param_groups") else [part._fsdp_param_group]
        for group in groups:
            if group is not None:
                group.post_backward()
    state._root_post_backward_final_callback()


# Process groups


def fake_process_group(rank: int, size: int) -> dist.ProcessGroup:
    """Make a group whose messages are not sent."""
    made: Any = FakeProcessGroup._create_internal(rank, size, None)  # type: ignore[call-arg]
    return made


def default_store() -> Any:
    """The store through which the ranks of the world have met; one that can be cloned, as torchrun's."""
    return dist.distributed_c10d._get_default_store()


# Pipelining


class PrivateHooksStage(PipelineStage):
    """A PipelineStage whose receive buffers a subclass may give back, by methods with public names.

    Overrides `_prepare_forward_infra` and `_prepare_backward_infra`, which fill `args_recv_info` and
    `grad_recv_info`, and `_get_init_p2p_neighbors_ops`.
    """

    def give_back(self, infos: Sequence[Any]) -> None:
        """Let go of the buffers of these notes on a stage's inputs."""
        raise NotImplementedError

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            self.give_back(infos)
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            self.give_back(infos)
        return result

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """torch 2.11 greets its neighbours before the first batch; gloo cannot send to itself (V-shaped schedules)."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def only_tensor(value: Any) -> torch.Tensor:
    """The one tensor that a stage hands over, which torch sometimes wraps."""
    if isinstance(value, torch.Tensor):
        return value
    (tensor,) = value
    return tensor


def take_gradient(value: Any) -> torch.Tensor | None:
    """The gradient of an input of a stage, if it is a tensor and has one, which it then has no more."""
    if not isinstance(value, torch.Tensor):
        return None
    grad, value.grad = value.grad, None
    return grad


def received(infos: Sequence[Any]) -> Iterator[Any]:
    """Of torch's notes on a stage's inputs, those that come from another stage: they have a `buffer`."""
    return (info for info in infos if getattr(info, "buffer", None) is not None)


def pipeline_order(
    schedule: Callable[..., PipelineSchedule], pp: int, num_stages: int, n_microbatches: int
) -> dict[int, list[Any]]:
    """The `pipeline_order` of a schedule with several stages on a rank, by rank: torch's actions, and None for a wait.

    It is built on stages that hold nothing and belong to no process group. Overrides `_add_bubbles_to_actions` and
    `_prepare_schedule_with_comms`: padding, sends and receives take most of the time and change no rank's order.
    """
    left_out = {
        "_add_bubbles_to_actions": lambda self, _: self.pipeline_order,
        "_prepare_schedule_with_comms": lambda *_: None,
    }
    order_only = type("OrderOnly", (schedule,), left_out)  # type: ignore[arg-type]
    stage = types.SimpleNamespace(num_stages=num_stages, group_size=pp, group_rank=0, submod=None)
    order: dict[int, list[Any]] = order_only([stage] * (num_stages // pp), n_microbatches).pipeline_order
    return order
