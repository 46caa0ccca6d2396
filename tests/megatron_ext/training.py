"""A tiny LLaMA, its data, and a training run whose outcome must not depend on the layout."""

import dataclasses
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron_ext.engine import Batch, BatchConfig, Engine, EngineConfig, RecomputeConfig
from megatron_ext.mesh import ParallelConfig, ProcessGrid, build_grid
from megatron_ext.models import ModelConfig
from megatron_ext.optim import OptimizerConfig, PrecisionConfig, TrainableConfig
from megatron_ext.pipeline import PipelineConfig
from megatron_ext.tensor_parallel import LoraConfig
from megatron_ext.zero import ZeroConfig

STEPS = 8
LR = 1e-3
_PARTS: dict[str, Any] = {
    "batch": BatchConfig,
    "parallel": ParallelConfig,
    "pipeline": PipelineConfig,
    "zero": ZeroConfig,
    "precision": PrecisionConfig,
    "optimizer": OptimizerConfig,
    "recompute": RecomputeConfig,
    "trainable": TrainableConfig,
    "lora": LoraConfig,
}
# Initial weights larger than usual, so that no gradient drowns in Adam's epsilon; a clip that bites on some steps.
_DEFAULTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "init_method_std": 0.1,
    "micro_batch_size": 2,
    "global_batch_size": 16,
    "seq_length": 16,
    "zero_stage": 0,
    "clip_grad": 1.4,
}


def tiny(**options: Any) -> EngineConfig:
    """The tiny run with any field of any part changed: `tiny(tensor_model_parallel_size=2, num_layers=7)`."""
    values = _DEFAULTS | options

    def build(part: Any) -> Any:
        names = [field.name for field in dataclasses.fields(part)]
        return part(**{name: values.pop(name) for name in names if name in values})

    config = EngineConfig(model=build(ModelConfig), **{name: build(part) for name, part in _PARTS.items()})
    assert not values, f"no such option: {', '.join(values)}"
    return config


def one_process(config: EngineConfig) -> EngineConfig:
    """The same training on a single rank: what every layout is held against."""
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        pipeline=PipelineConfig(),
        zero=ZeroConfig(zero_stage=0),
        recompute=RecomputeConfig(),
    )


def global_batch(config: EngineConfig, step: int, documents: bool = False) -> Batch:
    """The batch of a step. `documents`: two documents to a sequence, masked tokens, and one microbatch masked whole."""
    rows, length = config.batch.global_batch_size, config.batch.seq_length
    assert rows is not None
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(config.model.vocab_size, (rows, length + 1), generator=generator)
    batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
    if documents:
        start = torch.randint(1, length, (rows, 1), generator=generator)
        positions = torch.arange(length).expand(rows, -1)
        batch["document_ids"] = (positions >= start).long()
        batch["position_ids"] = torch.where(positions >= start, positions - start, positions)
        batch["loss_mask"] = (torch.rand(rows, length, generator=generator) < 0.7).float()
        batch["loss_mask"][: config.batch.micro_batch_size] = 0
    return batch


def share(batch: Batch, grid: ProcessGrid, micro_batch_size: int) -> Batch:
    """What this data-parallel rank sees: microbatch k of rank r starts at sample (k * dp + r) * micro batch size."""
    return {
        name: tensor.unflatten(0, (-1, grid.dp_size, micro_batch_size))[:, grid.dp_rank].flatten(0, 1)
        for name, tensor in batch.items()
    }


@dataclasses.dataclass
class Run:
    """losses, norms, skipped: by step. evaluated: eval loss of a step's batch just before that step. parameters: all
    that this rank knows of, whole. loss_scale: the last."""

    losses: torch.Tensor
    norms: torch.Tensor
    skipped: torch.Tensor
    evaluated: dict[int, float]
    parameters: dict[str, torch.Tensor]
    loss_scale: float


def train(config: EngineConfig, documents: bool = False, eval_at: tuple[int, ...] = (), steps: int = STEPS) -> Run:
    """Train on this rank. Collective."""
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    history, evaluated = [], {}
    for step in range(steps):
        batch = share(global_batch(config, step, documents), grid, config.batch.micro_batch_size)
        if step in eval_at:
            evaluated[step] = engine.eval_step(batch).item()
        history.append(engine.train_step(batch, LR))
    losses, norms, _, skipped = torch.stack(history).unbind(1)
    return Run(losses, norms, skipped, evaluated, whole_parameters(engine), float(engine.loss_scaler.scale))


def whole_parameters(engine: Engine) -> dict[str, torch.Tensor]:
    """Global name -> whole tensor, for every parameter of this rank's stages. Collective."""
    whole = {}
    for name, stored in engine.states().weights.items():
        assert isinstance(stored, DTensor)
        whole[name] = stored.full_tensor()
    return whole


def initial_weights(config: EngineConfig) -> dict[str, torch.Tensor]:
    return whole_parameters(Engine(config, build_grid(config.parallel, torch.device("cpu"))))


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest relative difference of two histories."""
    return ((a - b).abs() / b.abs()).max().item()
