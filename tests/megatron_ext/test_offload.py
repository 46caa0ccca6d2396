"""Weights, reduced gradients and optimizer states on the host: the same training, and what moves in a step."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megatron_ext.engine import BatchConfig, Engine, EngineConfig
from megatron_ext.mesh import ParallelConfig, ProcessGrid, build_grid, init_distributed
from megatron_ext.models import ModelConfig
from megatron_ext.models.count import parameters
from megatron_ext.zero import ZeroConfig
from tests.distributed import Pool
from tests.megatron_ext.fake_device import init_fake_device
from tests.megatron_ext.layouts import Layout, Reference, assert_parity, layout
from tests.megatron_ext.test_communication import memory
from tests.megatron_ext.training import LR, STEPS, tiny, train, worst
from tests.slow import sweep

OFFLOADED: dict[str, Any] = {"offload_optimizer": "cpu"}
TIED: dict[str, Any] = {"untie_embeddings_and_output_weights": False}
NEW_ROWS: dict[str, Any] = {"train_only": "new-rows", "base_vocab_size": 61}
LAYOUTS: dict[str, Layout] = {
    **{f"one rank, ZeRO-{zero}": layout(zero=zero, **OFFLOADED) for zero in (2, 3)},
    **{f"DP2 ZeRO-{zero}": layout(dp=2, zero=zero, **OFFLOADED) for zero in (1, 2, 3)},
    "DP2 ZeRO-3, accumulated": layout(dp=2, zero=3, accumulate_then_reduce=True, **OFFLOADED),
    "DP4 in shards of 2, ZeRO-3": layout(dp=4, zero=3, zero_shard_size=2, **OFFLOADED),
    "DP2 in shards of 1, ZeRO-2": layout(dp=2, zero=2, zero_shard_size=1, **OFFLOADED),
    "TP2 PP2 DP2 SP ZeRO-2": layout(2, 2, 2, sp=True, zero=2, documents=True, **OFFLOADED),
    "PP2 DP2 zbv ZeRO-3": layout(pp=2, dp=2, schedule="zbv", zero=3, documents=True, **OFFLOADED),
    "PP2 DP2 ZeRO-1, tied": layout(pp=2, dp=2, zero=1, **OFFLOADED, **TIED),
    "PP2 DP2 ZeRO-2, input embedding": layout(pp=2, dp=2, zero=2, train_only="embeddings", **OFFLOADED),
    "PP2 DP2 ZeRO-1, new rows": layout(pp=2, dp=2, zero=1, **NEW_ROWS, **OFFLOADED),
}


BY_DEFAULT = {"one rank, ZeRO-2", "DP4 in shards of 2, ZeRO-3", "PP2 DP2 ZeRO-1, tied"}


@pytest.mark.parametrize("name", sweep(LAYOUTS, BY_DEFAULT))
def test_offloaded_layout_equals_one_process(pool: Pool, reference: Reference, name: str) -> None:
    case = LAYOUTS[name]
    config = tiny(params_dtype="float64", **case.options)
    runs = pool.run(train, case.ranks, config, case.documents, (0, STEPS // 2))
    assert_parity(runs, reference(config, case.documents), name, "float64")


def copies_to_the_host(config: EngineConfig, world_size: int) -> tuple[list[int], list[int]]:
    """Sizes of what a step of rank 0 copies from the device, and of the gradients among it. Checks what is where."""
    device, copied = init_fake_device(world_size)
    grid = build_grid(config.parallel, device)
    engine = Engine(config, grid)
    if grid.size("pp") == 1:
        rows = config.batch.microbatches(grid.dp_size) * config.batch.micro_batch_size
        ids = torch.zeros(rows, config.batch.seq_length, dtype=torch.int64, device=device)
        batch = {"tokens": ids, "labels": ids, "loss_mask": torch.ones_like(ids, dtype=torch.float32)}
        assert engine.evaluate([batch, batch]).device == device
        assert engine.train_step(batch, LR).device == device
        received = _locals(engine.optimizer.params.values())
    else:  # torch's schedules look at a value when they begin; so without them, from given gradients
        assert engine.tied.source is not None
        received = _locals([engine.tied.source])
        for param in engine.optimizer.params.values():
            param.grad = torch.zeros_like(param.detach())
        engine.tied.sum_gradients()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        results = engine.optimizer.update(sums, LR, engine.loss_scaler.scale)
        assert all(result.device == device for result in results)
    states = engine.state_dict()
    for tensors in (states.weights, *states.optimizer.values()):
        assert all(tensor.device.type == "cpu" for tensor in _locals(tensors.values()))
    return copied, [gradient.numel() for gradient in received]


def _locals(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().to_local() for tensor in tensors if isinstance(tensor, DTensor)]


MICROBATCHES = 4  # of 16 samples, 2 at once on 2 ranks
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # how often in a step gradients come to the host
    "ZeRO-1": (1, {"zero_stage": 1}),
    "ZeRO-2": (MICROBATCHES, {"zero_stage": 2}),
    "ZeRO-3, bf16": (MICROBATCHES, {"zero_stage": 3, "bf16": True, "grad_reduce_in_bf16": True}),
    "ZeRO-3, fp16, new rows": (MICROBATCHES, {"zero_stage": 3, "fp16": True, **NEW_ROWS, "base_vocab_size": 30}),
    "ZeRO-3, accumulated": (1, {"zero_stage": 3, "accumulate_then_reduce": True}),
    "in shards of 1, ZeRO-2": (1, {"zero_stage": 2, "zero_shard_size": 1}),  # shards are summed on the device
    "PP2, tied": (1, {"zero_stage": 1, "pipeline_model_parallel_size": 2, **TIED}),  # the other stage's gradient
}


@pytest.mark.parametrize("name", sweep(CASES, {"ZeRO-3, fp16, new rows", "in shards of 1, ZeRO-2", "PP2, tied"}))
def test_a_step_copies_reduced_gradients_and_two_scalars_to_the_host(pool: Pool, name: str) -> None:
    times, options = CASES[name]
    config = tiny(**options, **OFFLOADED)
    ((copied, gradients),) = pool.run(copies_to_the_host, 1, config, 2 * config.parallel.model_parallel_size)
    assert sorted(copied) == sorted([*gradients * times, 1, 1])  # the factor of clipping, whether to skip the step


def device_memory(config: EngineConfig) -> tuple[float, float, float]:
    device, _ = init_fake_device(4)
    return memory(config, device)


@pytest.mark.parametrize(
    "stage, accumulate, shard",
    sweep(
        [(*case, shard) for case in ((1, False), (2, False), (3, False), (3, True)) for shard in (4, 2)],
        {(1, False, 4), (2, False, 2), (3, False, 4), (3, True, 2)},
    ),
)
def test_what_is_whole_is_on_the_device_and_nothing_else(pool: Pool, stage: int, shard: int, accumulate: bool) -> None:
    """Of what test_communication.py measures: between microbatches whole weights and whole gradients, and with replicas
    the shards that are summed over microbatches before they are over replicas; between steps nothing."""
    config = tiny(zero_stage=stage, zero_shard_size=shard, accumulate_then_reduce=accumulate, **OFFLOADED)
    model = config.model
    expected = 4.0 if stage in (1, 2) else 0.0
    if stage == 1 or accumulate:
        expected += 4
    else:  # the input of the last reduce-scatter, the embedding's
        expected += 4 * model.vocab_size * model.hidden_size / parameters(model) + (4 / shard if shard < 4 else 0)
    ((between_steps, before_update, between_microbatches),) = pool.run(device_memory, 1, config)
    assert between_steps == pytest.approx(0, abs=0.01)
    assert before_update == pytest.approx(0, abs=0.01)
    assert between_microbatches == pytest.approx(expected, abs=0.01)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGrid]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield build_grid(ParallelConfig(), init_distributed())
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_trains_alike_in_less_memory(gpu: ProcessGrid) -> None:
    """Of 16 bytes a parameter the moments' 8 leave the device at every stage; buffers of single layers come back."""
    model = ModelConfig(num_layers=8, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=8, vocab_size=8192)
    ids = torch.randint(model.vocab_size, (4, 129), generator=torch.Generator().manual_seed(0)).to(gpu.device)
    batch = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    weights: dict[str, torch.Tensor] = {}

    def run(zero: ZeroConfig) -> tuple[torch.Tensor, int]:
        engine = Engine(EngineConfig(model=model, batch=BatchConfig(2, 4, 128), zero=zero), gpu)
        for name, param in engine.parameters.items():  # those drawn on the host are others than those of the device
            (local,) = _locals([param])
            local.copy_(weights.setdefault(name, local.clone()))
        torch.cuda.reset_peak_memory_stats()
        history = torch.stack([engine.train_step(batch, LR) for _ in range(3)])
        return history[:, :2].cpu(), torch.cuda.max_memory_allocated()

    expected, most = run(ZeroConfig(zero_stage=0))
    for stage in (1, 2, 3):
        history, peak = run(ZeroConfig(zero_stage=stage, offload_optimizer="cpu"))
        assert worst(history, expected) <= 1e-3
        assert peak <= most - 6 * parameters(model)
