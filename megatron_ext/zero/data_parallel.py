"""Data parallelism of one pipeline stage: when parameters are gathered and when gradients are reduced.

    ZeRO stage   parameters between uses      gradients leave a rank
    0            whole                        once per step, all-reduce
    1            whole within a step          once per step, reduce-scatter (gathered once per step)
    2            whole within a step          every microbatch, reduce-scatter
    3            gathered layer by layer      every microbatch, reduce-scatter

With hybrid sharding the all-reduce over replicas happens once per step, whatever the stage. Gradients are
*summed*; the loss carries the scale. Zero-bubble schedules cut a backward pass into its "input" and its "weight"
half; stages 2 and 3 reduce after the weight half, and stage 3 gathers the whole pipeline stage for each half,
because torch's split backward reads all of its parameters at once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import Decoder
from megatron_ext.zero.config import ZeroConfig

_BUCKET_ELEMENTS = 1 << 25


class DataParallel:
    """A decoder whose parameters, gradients and so optimizer states are spread as a ZeRO stage says.

    decoder: on the meta device, parameters already distributed over tp. Afterwards `decoder`'s parameters are this
    rank's shards (DTensors), still on the meta device; materialise them with `to_empty`.
    """

    def __init__(self, decoder: Decoder, grid: ProcessGrid, zero: ZeroConfig):
        self.decoder = decoder
        self.module: nn.Module = decoder
        self.grid = grid
        self.stage = zero.zero_stage if grid.size("dp_shard") > 1 else 0
        if self.stage:
            self._shard()

    def _shard(self) -> None:
        decoder, grid = self.decoder, self.grid
        hybrid = grid.size("dp_replicate") > 1
        stored = next(decoder.parameters()).dtype
        options: dict[str, Any] = {
            "mesh": grid.mesh["dp_replicate", "dp_shard"] if hybrid else grid.mesh["dp_shard"],
            "reshard_after_forward": self.stage == 3,
            "shard_placement_fn": self._shard_dimension,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=decoder.dtype if decoder.dtype != stored else None,
                reduce_dtype=stored if decoder.dtype != stored else None,
                cast_forward_inputs=False,
            ),
        }
        tied_here = decoder.config.tied and decoder.stage.has_embedding and decoder.stage.has_head
        if decoder.stage.has_embedding and not tied_here:  # a matrix used twice stays in the root's group
            first = [getattr(decoder, name, None) for name in ("embed_tokens", "embed_positions", "embed_layernorm")]
            fully_shard([module for module in first if module is not None], **options)
        for layer in decoder.layers.values():
            fully_shard(layer, **options)
        if decoder.stage.has_head and not tied_here:
            fully_shard([decoder.norm, decoder.lm_head], **options)
        fully_shard(decoder, **options)
        self._prefetch_in_backward(tied_here)
        for module in self._fsdp_modules():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _prefetch_in_backward(self, tied_here: bool) -> None:
        """Name what each group gathers ahead in backward: the one before it, and the first nothing (itself).

        Left to itself FSDP goes by the order of past forwards, which with several microbatches runs over their
        ends: the first group would gather the last one again, in vain.
        """
        decoder = self.decoder
        groups: list[Any] = list(decoder.layers.values())
        if tied_here:
            groups.append(decoder)
        else:
            if decoder.stage.has_embedding:
                groups.insert(0, decoder.embed_tokens)
            if decoder.stage.has_head:
                groups.append(decoder.lm_head)
        for before, group in zip([groups[0], *groups], groups, strict=False):
            group.set_modules_to_backward_prefetch([before])

    def _shard_dimension(self, param: nn.Parameter) -> Shard:
        """ZeRO cuts the dimension that tensor parallelism does not, so that every shard is one plain block."""
        tp_cuts_rows = self.grid.size("tp") > 1 and _stored(param).placements[0].is_shard(0)
        return Shard(1) if tp_cuts_rows and param.ndim == 2 else Shard(0)

    def _fsdp_modules(self) -> Iterator[FSDPModule]:
        return (module for module in self.module.modules() if isinstance(module, FSDPModule))

    def before_backward(self, kind: str, last: bool) -> None:
        """Tell FSDP what the coming backward pass ("full", "input" or "weight" half; the step's last?) means."""
        if not self.stage:
            return
        reduce = kind == "full" and (last or self.stage >= 2)
        if kind != "full" and self.stage == 3:
            for module in self._fsdp_modules():
                module.unshard()
        self._set(reduce, reshard=self.stage == 3 or (reduce and last), last=last and reduce)

    def after_backward(self, kind: str, last: bool) -> None:
        """Reduce what the backward pass just finished leaves to be reduced by hand."""
        if not self.stage:
            if last:
                self._all_reduce_gradients()
        elif kind == "weight" and (last or self.stage >= 2):
            self._set(True, reshard=self.stage == 3 or last, last=last)
            _reduce_now(self.module)

    def _set(self, reduce: bool, reshard: bool, last: bool) -> None:
        module = self.module
        assert isinstance(module, FSDPModule)
        module.set_is_last_backward(last)
        module.set_reshard_after_backward(reshard)
        module.set_requires_gradient_sync(reduce)
        if reduce and self.grid.size("dp_replicate") > 1:
            module.set_requires_all_reduce(last)

    def reshard(self) -> None:
        """Give back gathered parameters after a pass without backward: they go stale at the next optimizer step."""
        for module in self._fsdp_modules():
            module.reshard()

    @torch.no_grad()
    def _all_reduce_gradients(self) -> None:
        """ZeRO-0: complete the tensor-parallel sums, then sum over all data-parallel ranks, in large buckets."""
        params = [p for p in self.module.parameters() if p.grad is not None]
        for p in params:  # a split backward may leave a transposed view, which others read in the order of storage
            p.grad = _grad(p).contiguous()
        partial = [p for p in params if _grad(p).placements[0].is_partial()]
        if self.grid.size("tp") > 1:
            _all_reduce([_grad(p).to_local() for p in partial], self.grid.mesh["tp"].get_group())
        for p in partial:
            grad = _grad(p)
            p.grad = DTensor.from_local(
                grad.to_local(),
                grad.device_mesh,
                _stored(p).placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
        for axis in ("dp_shard", "dp_replicate"):
            if self.grid.size(axis) > 1:
                _all_reduce([_grad(p).to_local() for p in params], self.grid.mesh[axis].get_group())


def _stored(param: nn.Parameter) -> DTensor:
    assert isinstance(param, DTensor)
    return param


def _grad(param: nn.Parameter) -> DTensor:
    assert isinstance(param.grad, DTensor)
    return param.grad


def _all_reduce(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sum every tensor over the group, in place; small ones travel together."""
    bucket: list[torch.Tensor] = []

    def flush() -> None:
        if len(bucket) == 1:
            dist.all_reduce(bucket[0], group=group)
        elif bucket:
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat, group=group)
            torch._foreach_copy_([t.view(-1) for t in bucket], list(flat.split([t.numel() for t in bucket])))
        bucket.clear()

    for tensor in tensors:
        if sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET_ELEMENTS:
            flush()
        bucket.append(tensor)
    flush()


def _reduce_now(module: nn.Module) -> None:
    """Reduce every accumulated gradient. Split backward passes run no FSDP post-backward hooks, so call them."""
    state = fully_shard.state(module)  # type: ignore[attr-defined]
    for part in state._state_ctx.all_states:
        groups = part._fsdp_param_groups if hasattr(part, "_fsdp_param_groups") else [part._fsdp_param_group]
        for group in groups:
            if group is not None:
                group.post_backward()
    state._root_post_backward_final_callback()
