"""Clipping is by the norm of the whole model's gradient, which is also what is reported: not a stage's, not a shard's.

Parity alone could miss it: AdamW's update hardly depends on the scale of the gradient.
"""

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.mesh import build_grid
from tests.distributed import Pool
from tests.megatron_ext.layouts import TOLERANCE, layout
from tests.megatron_ext.training import global_batch, one_process, share, tiny, whole_parameters
from tests.slow import sweep

# With an epsilon far above every gradient Adam's first step is lr / eps times the gradient: here, the gradient.
LINEAR: dict[str, Any] = {"adam_eps": 1e6, "weight_decay": 0.0}
RATE = 1e6
ENGINES: dict[str, dict[str, Any]] = {
    **{f"torch, ZeRO-{zero}": {"zero": zero, "params_dtype": "float64"} for zero in (0, 1, 3)},
    "torch, ZeRO-2 offloaded": {"zero": 2, "offload_optimizer": "cpu", "params_dtype": "float64"},
    **{f"deepspeed, ZeRO-{zero}": {"zero": zero, "zero_engine": "deepspeed"} for zero in (1, 2, 3)},
    "deepspeed, ZeRO-2 offloaded": {"zero": 2, "zero_engine": "deepspeed", "offload_optimizer": "cpu"},
}


def gradients(config: EngineConfig) -> dict[str, torch.Tensor]:
    """Of the first batch, on one process."""
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    engine.pipeline.forward_backward(global_batch(config, 0))
    return {name: p.grad.full_tensor() for name, p in engine.parameters.items() if isinstance(p.grad, DTensor)}


def one_step(config: EngineConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """The norm that the first step reports, and what it subtracted from the parameters of this rank."""
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    before = {name: weight.clone() for name, weight in whole_parameters(engine).items()}
    batch = share(global_batch(config, 0), grid, config.batch.micro_batch_size)
    norm = engine.train_step(batch, RATE)[1].item()
    return norm, {name: before[name] - weight for name, weight in whole_parameters(engine).items()}


def norm_of(gradients: dict[Any, torch.Tensor]) -> float:
    return torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()


def exact_norm_of(config: EngineConfig) -> float:
    return norm_of(gradients(config))


@pytest.mark.parametrize("engine", sweep(ENGINES, {"torch, ZeRO-3"}))
def test_the_norm_that_clips_is_the_whole_models(pool: Pool, engine: str) -> None:
    """At a value between the largest norm of a pipeline stage and the whole norm, where a stage would not clip."""
    if engine.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    case = layout(tp=2, pp=2, dp=2, sp=True, pipeline_layers=(2, 2), **ENGINES[engine], **LINEAR)
    (exact,) = pool.run(gradients, 1, one_process(tiny(**(case.options | {"params_dtype": "float64"}))))
    whole = norm_of(exact)
    on_first = ("embed_tokens", "layers.0.", "layers.1.")
    first = norm_of({name: g for name, g in exact.items() if name.startswith(on_first)})
    largest = max(first, (whole**2 - first**2) ** 0.5)
    clip = (largest + whole) / 2
    assert largest < 0.95 * clip < 0.95 * whole

    config = tiny(**case.options, clip_grad=clip)
    tolerance = 10 * TOLERANCE[config.precision.params_dtype]
    for norm, changes in pool.run(one_step, case.ranks, config):
        assert norm == pytest.approx(whole, rel=tolerance)
        for name, change in changes.items():
            expected = exact[name] * (clip / whole)
            assert (change - expected).norm() <= max(tolerance, 1e-6) * expected.norm(), name


# One layer over a real vocabulary: torch's own norm of its float32 gradient is 1.4e-3 too small on a CPU.
LONG: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 512,
    "num_attention_heads": 4,
    "vocab_size": 49_953,
    "untie_embeddings_and_output_weights": False,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "seq_length": 8,
}
LONG_SUMS: dict[str, dict[str, Any]] = {
    "torch": {},
    "torch, offloaded": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "deepspeed": {"zero_stage": 1, "zero_engine": "deepspeed"},
    "deepspeed, offloaded": {"zero_stage": 2, "zero_engine": "deepspeed", "offload_optimizer": "cpu"},
    "deepspeed, ZeRO-3": {"zero_stage": 3, "zero_engine": "deepspeed"},
}


def reported_norm(config: EngineConfig) -> float:
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    return engine.train_step(global_batch(config, 0), 0.0)[1].item()


def reported_and_held_norm(config: EngineConfig) -> tuple[float, float]:
    """Of DeepSpeed's stage 1 in bf16: what it reports, and the norm of the gradients that it has then."""
    from megatron_ext.zero.deepspeed import DeepSpeedStage

    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    batch = global_batch(config, 0)
    engine.pipeline.forward_backward(batch)
    stage = engine.stages[0]
    assert isinstance(stage, DeepSpeedStage)
    held = norm_of(dict(enumerate(stage.engine.optimizer.fp32_groups_gradients_flat)))
    norm = engine.optimizer.update(torch.zeros(2, dtype=torch.float64), 0.0, 1.0)[1]
    return norm.item(), held


@pytest.fixture(scope="module")
def exact_norm(pool: Pool) -> float:
    (norm,) = pool.run(exact_norm_of, 1, tiny(**LONG, params_dtype="float64"))
    return norm


@pytest.mark.parametrize("engine", sweep(LONG_SUMS, {"torch"}))
def test_the_norm_of_a_long_gradient_is_exact_in_float32(pool: Pool, exact_norm: float, engine: str) -> None:
    if engine.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    (norm,) = pool.run(reported_norm, 1, tiny(**LONG, **LONG_SUMS[engine]))
    assert norm == pytest.approx(exact_norm, rel=2e-6)


@pytest.mark.slow
def test_the_norm_of_a_long_gradient_is_exact_where_deepspeed_accumulates_it_itself(pool: Pool) -> None:
    pytest.importorskip("deepspeed")
    config = tiny(**LONG, zero_stage=1, zero_engine="deepspeed", bf16=True)
    ((norm, held),) = pool.run(reported_and_held_norm, 1, config)
    assert norm == pytest.approx(held, rel=2e-6)
