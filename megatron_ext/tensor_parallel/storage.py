"""How parameters are stored: every one a DTensor on the tp mesh, also where tp is 1.

One code path, one set of keys, and one source of truth: checkpoints, conversion, the gradient norm and
initialisation all read the placement of the parameter itself. Nothing is padded: rank r of a dimension of
size n holds rows [r * ceil(n / tp), (r + 1) * ceil(n / tp)), cut off at n (torch.chunk's rule).
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_ext.torch_private import compute_global_tensor_info, spec_and_local, with_spec


def tp_shard_range(size: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """First and one-past-last index that `tp_rank` holds of a dimension of `size`."""
    chunk = -(-size // tp_size)
    return min(size, tp_rank * chunk), min(size, (tp_rank + 1) * chunk)


def parameter_shard_dim(module: nn.Module, name: str) -> int | None:
    """The dimension that tensor parallelism shards of `module`'s own parameter `name`; None: replicated.

    A layer declares it in `tp_shard_dims`; what it does not mention is replicated.
    """
    return getattr(module, "tp_shard_dims", {}).get(name)


def shares_of_gradients(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(owner, name) of every parameter of `module` of whose gradient each tp rank computes a share only.

    The weight is replicated over tp, but each rank applies it to its own part of the activations (a norm under
    sequence parallelism, say). A layer declares such parameters in `tp_shares`; forgetting one is silent. Whoever
    reduces gradients sums the shares, once a step.
    """
    for owner in module.modules():
        for name in getattr(owner, "tp_shares", ()):
            if getattr(owner, name) is not None:
                yield owner, name


def gradient_of(param: nn.Parameter) -> DTensor:
    """The gradient of a parameter that has one."""
    assert isinstance(param.grad, DTensor)
    return param.grad


def distribute_parameters(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Replace every parameter of `model` (on the meta device, global shapes) by its DTensor, in place.

    Tied parameters stay tied. Only shapes and placements are decided here; values come later.
    """
    size, rank = tp_mesh.size(), tp_mesh.get_local_rank()
    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if param not in done:
                dim = parameter_shard_dim(module, name)
                local_shape = list(param.shape)
                placement: Placement = Replicate()
                if dim is not None:
                    start, stop = tp_shard_range(param.shape[dim], size, rank)
                    local_shape[dim] = stop - start
                    placement = Shard(dim)
                local = torch.empty(local_shape, dtype=param.dtype, device=param.device)
                stored = DTensor.from_local(
                    local, tp_mesh, [placement], run_check=False, shape=param.shape, stride=param.stride()
                )
                done[param] = nn.Parameter(stored, requires_grad=param.requires_grad)
            setattr(module, name, done[param])


def localize_parameters(module: nn.Module, device: torch.device, dtype: torch.dtype, done: dict[Any, Any]) -> None:
    """Replace every parameter of `module`, a DTensor on the tp mesh, by a plain one of this rank's shape, in place.

    Its storage is new and uninitialised. For engines that do not know DTensors. done: DTensor -> plain parameter,
    shared between calls so that tied parameters stay tied.
    """
    shares = set(shares_of_gradients(module))
    for owner in module.modules():
        for name, param in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(param, DTensor):
                continue
            if param not in done:
                local = torch.empty(param.to_local().shape, dtype=dtype, device=device)
                plain = nn.Parameter(local, requires_grad=param.requires_grad)
                if (owner, name) in shares:
                    plain.tp_group = param.device_mesh.get_group()  # type: ignore[attr-defined]  # see `local`
                done[param] = plain
            setattr(owner, name, done[param])


class _SumOfShares(torch.autograd.Function):
    """The identity; its gradient is summed over a group, in float32 at least, as FSDP does it."""

    @staticmethod
    def forward(ctx: Any, param: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return param.view_as(param)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _ToLocal(torch.autograd.Function):
    """`DTensor.to_local` for a gradient that is placed as the parameter is.

    (torch's takes the host longer than a small product does: its backward pass works the placement out anew.)
    """

    @staticmethod
    def forward(ctx: Any, param: DTensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.spec, local = spec_and_local(param)
        ctx.stride = local.stride()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> DTensor | None:
        if grad is None:
            return None
        if grad.stride() != ctx.stride:  # transposed: of an adapter, or of a split backward pass
            spec = ctx.spec
            _, stride = compute_global_tensor_info(grad, spec.mesh, spec.placements)
            return DTensor.from_local(
                grad, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=tuple(stride)
            )
        return with_spec(grad, copy.copy(ctx.spec))


class _Cast(torch.autograd.Function):
    """`param.to(dtype)`, kept in `made` by dtype: for as long as that stands, one copy serves every use."""

    @staticmethod
    def forward(ctx: Any, param: torch.Tensor, dtype: torch.dtype, made: dict[torch.dtype, torch.Tensor]) -> Any:
        ctx.dtype = param.dtype
        if dtype not in made:
            made[dtype] = param.to(dtype)
        return made[dtype].detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


def local(param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """This rank's part of `param` as a plain tensor in `dtype`, differentiable.

    Attributes of `param` that change how: `casts`, what was cast since a step began (see `DataParallel.begin`);
    `tp_group`, of a plain parameter whose gradient is to be summed at once over the ranks that compute shares of it.
    """
    casts = getattr(param, "casts", None)
    if isinstance(param, DTensor):
        param = _ToLocal.apply(param)
    elif hasattr(param, "tp_group"):
        param = _SumOfShares.apply(param, param.tp_group)
    if casts is None or param.dtype == dtype:
        return param.to(dtype)
    return _Cast.apply(param, dtype, casts)
