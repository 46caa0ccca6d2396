"""How FSDP2 holds a decoder: what is gathered together and what ahead, how it is cut, where and in which dtypes.

On CUDA, messages travel while the device computes, on streams of FSDP's own: a group is gathered while the one before
it computes (in stages 1 and 2 once a step, under its first forward pass), and gradients are reduced, over the shards
and over the replicas of hybrid sharding, while backward goes on with the group before.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import Decoder


def shard(decoder: Decoder, grid: ProcessGrid, reshard_after_forward: bool, offload: bool) -> None:
    """Make FSDP modules of a decoder's embedding, of each layer, of its head, and of the whole. Gradients are summed.

    decoder: on the meta device, parameters distributed over tp. Afterwards they are this rank's shards (DTensors).
    offload: shards and reduced gradients live on the host; whole parameters and gradients are on the device.
    """
    stored = next(decoder.parameters()).dtype
    mixed = decoder.dtype != stored

    def dimension(param: nn.Parameter) -> Shard:
        """ZeRO cuts the dimension that tensor parallelism does not, so that every shard is one plain block."""
        assert isinstance(param, DTensor)
        tp_cuts_rows = grid.size("tp") > 1 and param.placements[0].is_shard(0)
        return Shard(1) if tp_cuts_rows and param.ndim == 2 else Shard(0)

    options: dict[str, Any] = {
        "mesh": grid.mesh["dp_replicate", "dp_shard"] if grid.size("dp_replicate") > 1 else grid.mesh["dp_shard"],
        "reshard_after_forward": reshard_after_forward,
        "shard_placement_fn": dimension,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=decoder.dtype if mixed else None,
            reduce_dtype=stored if mixed else None,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=grid.device.type == "cuda") if offload else OffloadPolicy(),
    }
    stage = decoder.stage
    groups: list[list[nn.Module]] = [[layer] for layer in decoder.layers.values()]
    tied_here = decoder.config.tied and stage.has_embedding and stage.has_head
    if not tied_here:
        if stage.has_embedding:
            groups.insert(0, decoder.embedding_modules)
        if stage.has_head:
            groups.append([decoder.norm, decoder.lm_head])
    for modules in groups:
        fully_shard(modules, **options)
    fully_shard(decoder, **options)
    used: list[Any] = [modules[0] for modules in groups]
    whole = [decoder] if tied_here else []  # a matrix used twice stays in the root's group, which is first both ways
    _prefetch([*whole, *used], [*whole, *reversed(used)])
    for module in fsdp_modules(decoder):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _prefetch(forward: Sequence[Any], backward: Sequence[Any]) -> None:
    """Name what each group gathers ahead: the next one, in either direction.

    Left to itself FSDP goes backward by the order of past forwards, which with several microbatches runs over their
    ends: the first group would gather the last one again, in vain. So the first group names itself. And it goes
    forward when the host arrives at the next group, too late where the host is no faster than the device (small
    layers). The memory is that of any overlap: one group on its way beside the one in use.
    """
    for group, following in itertools.pairwise(forward):
        group.set_modules_to_forward_prefetch([following])
    for group, following in itertools.pairwise([*backward, backward[-1]]):
        group.set_modules_to_backward_prefetch([following])


def fsdp_modules(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))
