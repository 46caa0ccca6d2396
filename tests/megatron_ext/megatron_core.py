"""What of megatron-core runs on CPU, as an oracle. It is imported where it is used: that takes seconds."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from megatron_ext.kernels import KernelConfig, load_kernels
from megatron_ext.kernels.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.optim import OptimizerConfig
from megatron_ext.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    distribute_parameters,
)

BATCH, LENGTH, HIDDEN, INNER, VOCABULARY = 2, 3, 8, 12, 20


def differences(bias: bool) -> dict[str, float]:
    """Largest absolute difference of outputs and gradients, by layer, in float64. Run on the ranks of one tp group."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    tp = TensorParallel(size, dist.get_rank(), mesh.get_group())
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    config = ModelParallelConfig(
        tensor_model_parallel_size=size, use_cpu_initialization=True, params_dtype=torch.float64
    )
    torch.manual_seed(0)  # the same data on every rank
    found: dict[str, float] = {}

    def double(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def build(cls: type, *sizes: int, **options: Any) -> nn.Module:
        with torch.device("meta"):
            layer = cls(*sizes, tp, **options).double()
        distribute_parameters(layer, mesh)
        return layer.to_empty(device="cpu")

    def compare(kind: str, ours: nn.Module, theirs: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Same weights, same input, same gradient of the output. megatron-core has the sequence first."""
        with torch.no_grad():
            for name, param in theirs.named_parameters():
                param.copy_(double(*param.shape))
                if tuple(param.shape) == tuple(ours.get_parameter(name).shape):
                    dist.broadcast(param, 0)  # replicated over tp
                local(ours.get_parameter(name)).copy_(param)
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        outputs = [ours(inputs[0]) if x.is_floating_point() else ours(inputs[0], torch.float64)]
        result = theirs(inputs[1])
        outputs.append(result[0] if isinstance(result, tuple) else result)
        for output in outputs:
            output.backward(grad)
        found[f"{kind} output"] = distance(*outputs)
        if x.is_floating_point():
            found[f"{kind} input gradient"] = distance(inputs[0].grad, inputs[1].grad)
        for name, param in theirs.named_parameters():
            found[f"{kind} {name} gradient"] = distance(local(ours.get_parameter(name).grad), param.grad)

    # Every rank draws the whole and takes its part: what enters a row-parallel layer is cut, the rest is not.
    whole, cut = double(BATCH, LENGTH, HIDDEN), double(BATCH, LENGTH, INNER).chunk(size, dim=-1)[tp.rank].contiguous()
    products = load_kernels(KernelConfig())
    options = {"bias": bias, "skip_bias_add": False, "config": config, "init_method": nn.init.normal_}
    compare(
        "column",
        build(ColumnParallelLinear, HIDDEN, INNER, products=products, bias=bias),
        tensor_parallel.ColumnParallelLinear(HIDDEN, INNER, gather_output=False, **options),
        whole,
        cut,
    )
    compare(
        "row",
        build(RowParallelLinear, INNER, HIDDEN, products=products, bias=bias),
        tensor_parallel.RowParallelLinear(INNER, HIDDEN, input_is_parallel=True, **options),
        cut,
        whole,
    )
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    compare(
        "embedding",
        build(VocabParallelEmbedding, VOCABULARY, HIDDEN),
        tensor_parallel.VocabParallelEmbedding(VOCABULARY, HIDDEN, init_method=nn.init.normal_, config=config),
        ids,
        whole,
    )
    logits = [double(BATCH, LENGTH, VOCABULARY).chunk(size, dim=-1)[tp.rank].clone().requires_grad_()]
    logits.append(logits[0].detach().clone().requires_grad_())
    losses = [
        vocab_parallel_cross_entropy(logits[0], ids, VOCABULARY, tp),
        # It computes in place, in the memory of what it is given.
        tensor_parallel.vocab_parallel_cross_entropy(logits[1].clone(), ids),
    ]
    for loss in losses:
        loss.backward(whole[..., 0])
    found["cross entropy output"] = distance(*losses)
    found["cross entropy input gradient"] = distance(logits[0].grad, logits[1].grad)
    parallel_state.destroy_model_parallel()
    return found


def local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def distance(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return (a - b).abs().max().item()


def learning_rates(config: OptimizerConfig, train_iters: int, iterations: Iterable[int]) -> list[float]:
    """The rate that Megatron-LM's scheduler gives the 0-based iterations."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class NoOptimizer:
        param_groups: list[dict] = []

    scheduler = OptimizerParamScheduler(
        NoOptimizer(),
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=config.lr_decay_iters or train_iters,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_iters,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
    rates = []
    for iteration in iterations:
        scheduler.num_steps = iteration
        rates.append(scheduler.get_lr({}))
    return rates
