"""Where DeepSpeed keeps the float32 weights and the states of AdamW.

ZeRO flattens the parameters and cuts the result, so a rank updates a *fragment* of each: a range of the flattened
parameter, or nothing of it. DeepSpeed's optimizers each say differently where it lies; here all of them yield the
same. What they have no public name for is read as version 0.19 has it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_ext.optim.adamw import AdamW
from megatron_ext.optim.algorithm import STEP, new_state, stored_states

WEIGHT = "weight"
STATES = tuple(stored_states(AdamW, torch.Size(), torch.float32))


@dataclasses.dataclass(frozen=True)
class Fragment:
    """What this rank updates of `param`: its flattened elements from `start` on.

    views: by WEIGHT and STATES, float32 [n], n the same for all and maybe 0. whole: the parameter in the computing
    dtype where this rank holds all of it, which is to be written together with the views.
    """

    param: nn.Parameter
    start: int
    views: dict[str, torch.Tensor]
    whole: torch.Tensor | None


@torch.no_grad()
def fragments(engine: Any, changed: bool = False) -> Iterator[Fragment]:
    """The fragment of every parameter of a DeepSpeed engine, usable until the next one is asked for.

    changed: the caller writes to them; shards in the computing dtype and files on NVMe then follow. All
    data-parallel ranks go through them together, in the same order. Adam's states are made where there are none yet.
    """
    if engine.zero_optimization_stage() == 3:
        yield from _of_stage_3(engine.optimizer, changed)
    else:
        yield from _of_stages_1_and_2(engine.optimizer)


def _of_stages_1_and_2(optimizer: Any) -> Iterator[Fragment]:
    """One flat partition for each group of parameters; every rank has all weights in the computing dtype."""
    adam = optimizer.optimizer
    params = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    for group, of_group in zip(adam.param_groups, params, strict=True):
        (flat,) = group["params"]
        tensors = {WEIGHT: flat.detach(), **_states(adam, flat)}
        for param in of_group:
            place = param._hp_mapping
            start, offset, n = 0, 0, 0
            if place is not None:
                start = place.lp_fragment_address.start
                offset, n = place.hp_fragment_address.start, place.hp_fragment_address.numel
            views = {name: tensor.narrow(0, offset, n) for name, tensor in tensors.items()}
            yield Fragment(param, start, views, whole=param.detach())


def _of_stage_3(optimizer: Any, changed: bool) -> Iterator[Fragment]:
    """One flat partition for each sub-group, of shards of equal size, the last one padded; maybe on NVMe."""
    adam = optimizer.optimizer
    if changed:
        optimizer._partition_all_parameters()
    for i, of_group in enumerate(optimizer.fp16_groups):
        swapped = optimizer._swappable_optimizer_subgroup(i)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        flat = optimizer.fp32_partitioned_groups_flat[i]
        tensors = {WEIGHT: flat.detach(), **_states(adam, flat)}
        for param in of_group:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(param)]
            start = min(size * optimizer._get_param_partition_rank(param), param.ds_numel)  # the last may have nothing
            n = min(param.ds_numel - start, size)
            views = {name: tensor.narrow(0, offset, n) for name, tensor in tensors.items()}
            yield Fragment(param, start, views, whole=None)
        if changed:
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if swapped and changed:
            optimizer._optimizer_states_and_gradient_swap_out(i)
        elif swapped:
            optimizer._release_swap_buffers(i)
    if changed:
        _gather_persistent(optimizer)
        optimizer.invalidate_secondary_tensor()  # hpZ's second copies


def recover(engine: Any) -> None:
    """Do what DeepSpeed forgets where it skips a step: else the next ones fail, or are skipped too."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        _gather_persistent(optimizer)
    elif hasattr(optimizer, "averaged_gradients"):  # with offload they keep what is not finite
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))


def _gather_persistent(optimizer: Any) -> None:
    """Stage 3 keeps small parameters whole on every rank between steps: make them so again from their shards."""
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _states(adam: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    state = adam.state[flat]
    if STEP not in state:
        state.update(new_state(AdamW, flat.detach()))
    return {name: state[name] for name in STATES}


def weights(engine: Any) -> Iterator[torch.Tensor]:
    """The weights in the computing dtype that this rank holds: whole ones and, at stage 3, shards."""
    for param in engine.module.parameters():
        yield param.detach()
        if hasattr(param, "ds_tensor"):
            yield param.ds_tensor


def gradients(engine: Any) -> Iterator[torch.Tensor]:
    """What is held of gradients between the last backward pass and the update, under all names it has."""
    optimizer = engine.optimizer
    yield from _tensors([param.grad for param in engine.module.parameters()])
    yield from _tensors([flat.grad for flat in optimizer.optimizer.state])
    for name in (
        "averaged_gradients",  # stages 1 and 2
        "accumulated_grads_in_cpu",  # with offload
        "fp32_groups_gradients_flat",  # stage 1 in bf16
        "grad_partitions_flat_buffer",  # stage 3
    ):
        yield from _tensors(getattr(optimizer, name, None))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
