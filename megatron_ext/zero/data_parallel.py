"""Data parallelism of one pipeline stage: when parameters are gathered and when gradients are reduced.

    ZeRO stage   parameters between uses      gradients leave a rank
    0            whole                        once per step, all-reduce
    1            whole within a step          once per step, reduce-scatter (gathered once per step)
    2            whole within a step          every microbatch, reduce-scatter
    3            gathered layer by layer      every microbatch, reduce-scatter; or once per step, if accumulated whole

With hybrid sharding the all-reduce over replicas happens once per step, whatever the stage. Gradients are
*summed*; the loss carries the scale. Those of which every tensor-parallel rank computes a share are summed over these
once a step too, together, when all else is done: on shards, where there are any. What is accumulated over
microbatches is accumulated in the dtype of the stored weights, in whatever dtype it travels. Zero-bubble schedules cut
a backward pass into its "input" and its "weight" half; stages 2 and 3 reduce after the weight half, and stage 3 gathers
the whole pipeline stage for each half, because torch's split backward reads all of its parameters at once.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import Decoder
from megatron_ext.tensor_parallel import gradient_of, shares_of_gradients
from megatron_ext.torch_private import finish_backward, foreach_copy_
from megatron_ext.zero.config import ZeroConfig
from megatron_ext.zero.reduction import Bfloat16ReduceScatter, all_reduce
from megatron_ext.zero.sharding import fsdp_modules, shard


class DataParallel:
    """A decoder whose parameters, gradients and so optimizer states are spread as a ZeRO stage says; it is a
    `zero.DataParallelStage`.

    decoder: on the meta device, parameters already distributed over tp. Afterwards `decoder`'s parameters are this
    rank's shards (DTensors), still on the meta device; materialise them with `to_empty` on `device`: the grid's, or
    the host if they are offloaded.
    """

    averaged_over = 1  # data-parallel ranks whose gradients are averaged: here they are summed

    def __init__(self, decoder: Decoder, grid: ProcessGrid, zero: ZeroConfig):
        self.decoder = decoder
        self.module: nn.Module = decoder
        self.grid = grid
        offload = zero.offload_optimizer is not None
        self.device = torch.device("cpu") if offload else grid.device
        # FSDP is what offloads: with it a rank that shares with nobody has a single shard
        self.stage = zero.zero_stage if offload or grid.size("dp_shard") > 1 else 0
        self._reduces_each = self.stage >= 2 and not zero.accumulate_then_reduce
        self._in_bf16 = zero.grad_reduce_in_bf16
        self._reduce_scatter = Bfloat16ReduceScatter()
        if self.stage:
            shard(decoder, grid, self.stage == 3, offload)
            if self._in_bf16:
                for module in fsdp_modules(decoder):
                    module.set_custom_reduce_scatter(self._reduce_scatter)

    def begin(self) -> None:
        """Start a step, or an evaluation: what parameters are now they stay until it is over.

        Where FSDP does not hold them in the dtype that is computed in, each is cast at its first use and the copy kept,
        for all microbatches, until the last backward pass (or `reshard`). Not in layers that are computed again: there
        no microbatch keeps a copy.
        """
        if not self.stage:
            self._keep_casts(True)

    def _keep_casts(self, keep: bool) -> None:
        again = {p for layer in self.decoder.layers.values() if layer.recompute for p in layer.parameters()}
        for param in self.module.parameters():
            if param in again:
                continue
            param.casts = {} if keep else None  # type: ignore[attr-defined]  # see tensor_parallel.storage.local

    def backward(self, output: torch.Tensor, grad: torch.Tensor | None, last: bool) -> None:
        self.before_backward("full", last)
        torch.autograd.backward(output, grad)
        self.after_backward("full", last)

    def before_backward(self, kind: str, last: bool) -> None:
        """Tell FSDP what the coming backward pass ("full", "input" or "weight" half; the step's last?) means."""
        if not self.stage:
            return
        reduce = kind == "full" and (last or self._reduces_each)
        if kind != "full" and self.stage == 3:
            for module in fsdp_modules(self.module):
                module.unshard()
        self._set(reduce, reshard=self.stage == 3 or (reduce and last), last=last and reduce)

    def after_backward(self, kind: str, last: bool) -> None:
        if self.stage and kind == "weight":
            self._set(last or self._reduces_each, reshard=self.stage == 3 or last, last=last)
            finish_backward(self.module)
        if last and kind != "input":
            self._finish_step()

    @torch.no_grad()
    def _finish_step(self) -> None:
        if not self.stage:
            self._keep_casts(False)
            self._all_reduce_gradients()
        if self.grid.size("tp") > 1:
            self._sum_shares()

    def _sum_shares(self) -> None:
        """Sum over tensor parallelism the gradients of which each rank has computed a share, in one message."""
        params = [getattr(owner, name) for owner, name in shares_of_gradients(self.module)]
        grads = [gradient_of(p).to_local() for p in params if p.grad is not None]
        on_device = [grad.to(self.grid.device) for grad in grads]  # offloaded ones are on the host
        all_reduce(on_device, self.grid.mesh["tp"].get_group())
        if grads and self.device != self.grid.device:
            foreach_copy_(grads, on_device)

    def _set(self, reduce: bool, reshard: bool, last: bool) -> None:
        module = self.module
        assert isinstance(module, FSDPModule)
        module.set_is_last_backward(last)
        module.set_reshard_after_backward(reshard)
        module.set_requires_gradient_sync(reduce)
        if reduce and self.grid.size("dp_replicate") > 1:
            module.set_requires_all_reduce(last)
            self._reduce_scatter.partial = not last

    def reshard(self) -> None:
        if not self.stage:
            self._keep_casts(False)
        for module in fsdp_modules(self.module):
            module.reshard()

    def _all_reduce_gradients(self) -> None:
        """ZeRO-0: sum over all data-parallel ranks, in large buckets."""
        params = [p for p in self.module.parameters() if p.grad is not None]
        for p in params:  # a split backward may leave a transposed view, which others read in the order of storage
            p.grad = gradient_of(p).contiguous()
        dtype = torch.bfloat16 if self._in_bf16 else None
        for axis in ("dp_shard", "dp_replicate"):
            if self.grid.size(axis) > 1:
                all_reduce([gradient_of(p).to_local() for p in params], self.grid.mesh[axis].get_group(), dtype)
