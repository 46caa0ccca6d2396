"""A pipeline stage under DeepSpeed's ZeRO: our layers and our schedule outside, its sharding inside."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import Decoder
from megatron_ext.optim import OptimizerConfig, by_weight_decay
from megatron_ext.optim.adamw import torch_adamw
from megatron_ext.tensor_parallel import localize_parameters
from megatron_ext.zero.deepspeed.adapt import (
    prepare,
    quiet_unless_it_fails,
    sum_norm_once,
    take_norms_exactly,
    use_disk,
)
from megatron_ext.zero.deepspeed.mpu import ModelParallelUnit


class DeepSpeedStage:
    """A decoder whose data parallelism is a DeepSpeed engine's; it is a `zero.DataParallelStage`.

    decoder: on the meta device, parameters distributed over tp. Afterwards they are plain tensors of the tp shapes
    on the device (at stage 3 shards), uninitialised, in the computing dtype; DeepSpeed keeps float32 masters.
    stored: by name, what each parameter is to the other ranks of its tp group: a DTensor on the meta device.
    """

    def __init__(
        self,
        decoder: Decoder,
        grid: ProcessGrid,
        settings: dict[str, Any],
        optimizer: OptimizerConfig,
        nvme_path: str | None = None,
    ):
        import deepspeed

        self.decoder, self.grid = decoder, grid
        self.averaged_over = grid.dp_size  # data-parallel ranks whose gradients DeepSpeed averages
        self._disk = None if nvme_path is None else use_disk(nvme_path)  # as long as this stage lives
        unit = ModelParallelUnit(grid)
        prepare(unit.get_data_parallel_group())
        self.stored = {name: _placed(param) for name, param in decoder.named_parameters()}
        self._materialise(settings, unit)
        for name, param in decoder.named_parameters():
            # the norm counts what is not cut over tp once, on the first rank of the tp group
            param.model_parallel = not self.stored[name].placements[0].is_replicate()  # type: ignore[attr-defined]
        params = dict(decoder.named_parameters())
        groups = by_weight_decay(self.stored, optimizer.weight_decay)
        adamw = torch_adamw(optimizer, ((decay, [params[name] for name in names]) for decay, names in groups))
        with quiet_unless_it_fails():
            self.engine, *_ = deepspeed.initialize(model=decoder, optimizer=adamw, config=settings, mpu=unit)
        if settings["zero_optimization"]["stage"] == 3:
            sum_norm_once(self.engine.optimizer, grid.device)
        elif hasattr(self.engine.optimizer, "get_grads_for_norm"):
            take_norms_exactly(self.engine.optimizer)
        self.module: nn.Module = self.engine

    def _materialise(self, settings: dict[str, Any], unit: ModelParallelUnit) -> None:
        """Give the parameters storage; at stage 3 layer by layer, each sharded before the next one exists."""
        from deepspeed.runtime.zero import Init
        from deepspeed.utils import groups

        tied: dict[Any, Any] = {}
        for child in (*self.decoder.layers.values(), self.decoder):
            localize_parameters(child, self.grid.device, self.decoder.dtype, tied)
            if settings["zero_optimization"]["stage"] == 3:
                Init(
                    module=child,
                    data_parallel_group=unit.get_data_parallel_group(),
                    config_dict_or_path=settings,
                    dtype=self.decoder.dtype,
                    mpu=unit,
                    zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),  # hpZ's, once it exists
                )

    def begin(self) -> None:
        """Nothing to do: DeepSpeed holds the weights in the dtype that is computed in."""

    def backward(self, output: torch.Tensor, grad: torch.Tensor | None, last: bool) -> None:
        self.before_backward("full", last)
        loss = output.sum() if grad is None else _HandOver.apply(output, grad)
        self.engine.backward(loss, scale_wrt_gas=False)

    def before_backward(self, kind: str, last: bool) -> None:
        """Get ready for a whole backward pass; halves of one have been refused."""
        assert kind == "full"
        # DeepSpeed notes the end of a backward pass at the next forward pass. A pipeline runs backward passes in a
        # row, and stage 3 would then overwrite the first gradient with the second instead of adding: note it now.
        self.engine.optimizer.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(last)

    def after_backward(self, kind: str, last: bool) -> None:
        """Nothing to do: DeepSpeed has reduced what it reduces."""

    def reshard(self) -> None:
        """Nothing to do: DeepSpeed gives gathered parameters back by itself."""


def _placed(param: nn.Parameter) -> DTensor:
    assert isinstance(param.data, DTensor)
    return param.data


class _HandOver(torch.autograd.Function):
    """A scalar whose gradient with respect to `output` is `grad`: DeepSpeed's backward starts from scalars only."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grad)
        return torch.zeros((), device=output.device)

    @staticmethod
    def backward(ctx: Any, one: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad, None
