"""What is measured: one training step, done in every way there is."""

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from megatron_ext.engine import Batch, BatchConfig, Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.footprint import ModelStates, nbytes
from megatron_ext.mesh import ParallelConfig, ProcessGrid, build_grid
from megatron_ext.models import ModelConfig, initialize_parameter, preset
from megatron_ext.models.count import parameters_per_layer
from megatron_ext.models.decoder import whole_model
from megatron_ext.optim import PrecisionConfig, by_weight_decay, squared_norms
from megatron_ext.optim.adamw import torch_adamw
from megatron_ext.tensor_parallel import distribute_parameters, localize_parameters
from megatron_ext.zero import ZeroConfig
from megatron_ext.zero.deepspeed.check import check_installed
from megatron_ext.zero.deepspeed.schema import BF16_STAGE_1, SETTINGS

DDP = "DDP"
_CPU_SHAPE = ModelConfig(
    num_layers=4, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, vocab_size=4000
)  # 10 M parameters
_LR = 1e-4


@dataclasses.dataclass(frozen=True)
class Contender:
    """step: [loss, gradient norm] of one, on the device. states: bytes that this rank holds."""

    step: Callable[[], torch.Tensor]
    states: Callable[[], ModelStates]


@dataclasses.dataclass(frozen=True)
class Task:
    """What all contenders are given. batch: this rank's."""

    config: EngineConfig
    grid: ProcessGrid
    batch: Batch

    @classmethod
    def of(cls, options: argparse.Namespace, device: torch.device) -> "Task":
        """Collective."""
        model = _CPU_SHAPE if options.model is None else preset(options.model)
        if options.num_layers is not None:
            model = dataclasses.replace(model, num_layers=options.num_layers)
        rows = options.micro_batch_size * options.microbatches
        batch = BatchConfig(options.micro_batch_size, rows * dist.get_world_size(), options.seq_length)
        config = EngineConfig(model, batch, precision=PrecisionConfig(bf16=device.type == "cuda"))
        config = config.validate(dist.get_world_size())
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(model.vocab_size, (rows, options.seq_length + 1), generator=generator).to(device)
        data = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        return cls(config, build_grid(ParallelConfig(), device), data)


def ddp(task: Task) -> Contender:
    """torch's DistributedDataParallel, its gradients views of its buckets, reduced with the last microbatch."""
    config, microbatches = task.config, task.config.batch.microbatches(task.grid.dp_size)
    decoder = whole_model(config.model, config.precision.compute)
    distribute_parameters(decoder, task.grid.mesh["tp"])
    placed = dict(decoder.named_parameters())
    localize_parameters(decoder, task.grid.device, config.precision.stored, {})
    params = dict(decoder.named_parameters())
    for name, where in placed.items():
        assert isinstance(where, DTensor)
        initialize_parameter(name, where, params[name].detach(), config.model, config.seed, task.grid.device)
    model = DistributedDataParallel(decoder, gradient_as_bucket_view=True)
    groups = by_weight_decay(params, config.optimizer.weight_decay)
    optimizer = torch_adamw(
        dataclasses.replace(config.optimizer, lr=_LR),
        ((decay, [params[name] for name in names]) for decay, names in groups),
    )
    gradients = 0

    def step() -> torch.Tensor:
        nonlocal gradients
        losses = []
        parts = zip(*(task.batch[name].chunk(microbatches) for name in ("tokens", "labels")), strict=True)
        for i, (tokens, labels) in enumerate(parts, 1):
            with contextlib.nullcontext() if i == microbatches else model.no_sync():
                loss = model(tokens, labels)
                (loss / (microbatches * labels.numel())).sum().backward()
            losses.append(loss.detach() / labels.numel())
        squares = squared_norms([param.grad for param in params.values() if param.grad is not None])
        norm = squares.sum().sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(params.values(), config.optimizer.clip_grad, norm)
        gradients = nbytes(param.grad for param in params.values() if param.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # or the next ones would lie beside the buckets
        mean = torch.stack(losses).mean() / task.grid.dp_size
        dist.all_reduce(mean)
        return torch.stack([mean, norm])

    def states() -> ModelStates:
        moments = nbytes(tensor for state in optimizer.state.values() for tensor in state.values())
        return ModelStates(nbytes(params.values()), gradients, moments)

    return Contender(step, states)


def ours(task: Task, **zero: Any) -> Contender:
    engine = Engine(dataclasses.replace(task.config, zero=ZeroConfig(**zero)), task.grid)
    return Contender(lambda: engine.train_step(task.batch, _LR, measure=True)[:2], engine.model_states)


def deepspeed(task: Task, zero_stage: int, **zero: Any) -> Contender:
    """Its buffers, by default for billions of parameters, hold what native messages do: a layer, and the next ahead."""
    layer = parameters_per_layer(task.config.model)
    all_sizes = {
        "reduce_bucket_size": layer,
        "allgather_bucket_size": layer,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": 2 * layer,
        "stage3_param_persistence_threshold": task.config.model.hidden_size,
    }
    where = BF16_STAGE_1 if zero_stage == 1 and task.config.precision.bf16 else str(zero_stage)
    sizes = {key: size for key, size in all_sizes.items() if where in SETTINGS[f"zero_optimization.{key}"].stages}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deepspeed.json"
        file.write_text(json.dumps({"zero_optimization": sizes}), encoding="utf-8")
        return ours(task, zero_stage=zero_stage, zero_engine="deepspeed", deepspeed_config=str(file), **zero)


def contenders(task: Task) -> dict[str, Callable[[], Contender]]:
    """How to build each; DeepSpeed's only where it is installed."""
    found: dict[str, Callable[[], Contender]] = {DDP: lambda: ddp(task)}

    def add(name: str, build: Callable[..., Contender], **zero: Any) -> None:
        found[name] = lambda: build(task, **zero)

    offload = {"offload_optimizer": "cpu"}
    for stage in range(4):
        add(f"native ZeRO {stage}", ours, zero_stage=stage)
    add("native ZeRO 3, accumulating", ours, zero_stage=3, accumulate_then_reduce=True)
    if task.grid.device.type == "cuda":
        for stage in (2, 3):
            add(f"native ZeRO {stage}, offload", ours, zero_stage=stage, **offload)
    try:
        check_installed()
    except RequestError as error:
        if dist.get_rank() == 0:
            print(f"without DeepSpeed's: {error}", file=sys.stderr)
        return found
    for stage in (1, 2, 3):
        add(f"DeepSpeed ZeRO {stage}", deepspeed, zero_stage=stage)
    if task.grid.device.type == "cuda":
        for stage in (2, 3):
            add(f"DeepSpeed ZeRO {stage}, offload", deepspeed, zero_stage=stage, **offload)
    return found
