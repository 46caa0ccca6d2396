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

STEPS = 5  # as many as there are kinds of uneven masks
LR = 1e-3
VALID = range(3, 5)  # batches of the evaluation in the end; with documents the first one is masked whole
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
    "clip_grad": 1.5,
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
    """The batch of a step. `documents`: two documents to a sequence, and an uneven mask."""
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
        batch["loss_mask"] = _uneven_mask(rows, length, step, generator)
    return batch


def _uneven_mask(rows: int, length: int, step: int, generator: torch.Generator) -> torch.Tensor:
    """Every row masked to its own degree, what is left with weights, and of every 1, 2, 4, 8 or 16 rows by turns the
    first ones masked whole: in some steps a microbatch, in some a data-parallel rank, in some the global batch."""
    mask = (torch.rand(rows, length, generator=generator) < torch.rand(rows, 1, generator=generator)).float()
    mask *= 0.5 + torch.rand(rows, length, generator=generator)
    mask[torch.arange(rows) // (1, 2, 4, 16, 8)[step % 5] % 2 == 0] = 0
    return mask


def share(batch: Batch, grid: ProcessGrid, micro_batch_size: int) -> Batch:
    """What this data-parallel rank sees: microbatch k of rank r starts at sample (k * dp + r) * micro batch size."""
    return {
        name: tensor.unflatten(0, (-1, grid.dp_size, micro_batch_size))[:, grid.dp_rank].flatten(0, 1)
        for name, tensor in batch.items()
    }


@dataclasses.dataclass
class Run:
    """losses, norms, skipped: by step. evaluated: eval loss of a step's batch just before that step. valid_loss: in the
    end, of several batches. parameters: all that this rank knows of, whole. loss_scale: the last."""

    losses: torch.Tensor
    norms: torch.Tensor
    skipped: torch.Tensor
    evaluated: dict[int, float]
    valid_loss: float
    parameters: dict[str, torch.Tensor]
    loss_scale: float


def train(config: EngineConfig, documents: bool = False, eval_at: tuple[int, ...] = (), steps: int = STEPS) -> Run:
    """Train on this rank. Collective."""
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    history, evaluated = [], {}

    def batch(step: int) -> Batch:
        return share(global_batch(config, step, documents), grid, config.batch.micro_batch_size)

    for step in range(steps):
        if step in eval_at:
            evaluated[step] = engine.evaluate([batch(step)]).item()
        history.append(engine.train_step(batch(step), LR))
    losses, norms, _, skipped = torch.stack(history).unbind(1)
    valid_loss = engine.evaluate(map(batch, VALID)).item()
    scale = float(engine.loss_scaler.scale)
    return Run(losses, norms, skipped, evaluated, valid_loss, whole_parameters(engine), scale)


def whole_parameters(engine: Engine) -> dict[str, torch.Tensor]:
    """Global name -> whole tensor, for every parameter of this rank's stages. Collective."""
    whole = {}
    for name, stored in engine.state_dict().weights.items():
        assert isinstance(stored, DTensor)
        whole[name] = stored.full_tensor()
    return whole


def initial_weights(config: EngineConfig) -> dict[str, torch.Tensor]:
    return whole_parameters(Engine(config, build_grid(config.parallel, torch.device("cpu"))))


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest relative difference of two histories; what is 0 in `b` must be so in `a`."""
    return ((a - b).abs() / b.abs().clamp(min=torch.finfo(b.dtype).tiny)).max().item()
