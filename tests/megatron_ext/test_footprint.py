"""Bytes of weights, gradients and optimizer states: formulas against published figures, ranks against formulas."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.footprint import PAPER, Footprint, ModelStates, nbytes, one_copy
from megatron_ext.mesh import build_grid
from megatron_ext.models.count import matmul_parameters_per_layer, parameters, parameters_per_layer
from tests.distributed import Pool
from tests.megatron_ext.training import LR, global_batch, share, tiny
from tests.slow import sweep

OURS = one_copy(torch.float32)


def of_rank(footprint: Footprint, psi: float, stage: int, ranks: int) -> ModelStates:
    return footprint.of_rank(ModelStates(psi, psi, psi), stage, ranks)


@pytest.mark.parametrize("stage, gigabytes", [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_figure_1_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """arXiv 1910.02054: 7.5 billion parameters on 64 ranks, K = 12; a gigabyte is 1e9 bytes."""
    assert round(of_rank(PAPER, 7.5e9, stage, 64).total / 1e9, 1) == gigabytes


# arXiv 1910.02054, table 1, by ranks: gigabytes at stages 1, 2, 3 of models with 7.5B, 128B and 1T parameters
TABLE_1 = {
    1: "120 120 120  2048 2048 2048  16000 16000 16000",
    4: "52.5 41.3 30  896 704 512  7000 5500 4000",
    16: "35.6 21.6 7.5  608 368 128  4750 2875 1000",
    64: "31.4 16.6 1.88  536 284 32  4187 2218 250",
    256: "30.4 15.4 0.47  518 263 8  4046 2054 62.5",
    1024: "30.1 15.1 0.12  513 257 2  4011 2013 15.6",
}


@pytest.mark.parametrize("ranks", TABLE_1)
def test_table_1_of_the_zero_paper(ranks: int) -> None:
    cells = itertools.product((7.5e9, 128e9, 1e12), (1, 2, 3))
    for (psi, stage), printed in zip(cells, TABLE_1[ranks].split(), strict=True):
        last_digit = 10.0 ** int(Decimal(printed).as_tuple().exponent)  # which the paper rounds here and cuts there
        assert abs(of_rank(PAPER, psi, stage, ranks).total / 1e9 - float(printed)) < last_digit


# DeepSpeed's optimizer has the paper's states, and while it updates, its shard of the gradients in float32.
DEEPSPEED = dataclasses.replace(PAPER, bytes=dataclasses.replace(PAPER.bytes, optimizer=PAPER.bytes.optimizer + 4))
HOST_BUFFERS = 1.5


def deepspeeds_estimate(
    psi: float, layer: float, stage: int, gpus: int, nodes: int, offload: str, init: bool = False
) -> tuple[float, float]:
    """Bytes on a GPU, and of a node's host memory, as DeepSpeed's documentation ("Memory Requirements") counts them.

    layer: the largest one's parameters. offload: "", "optimizer" or "optimizer, param". init: weights are made layer
    by layer (`zero.Init`), not whole and in float32 by every process.
    """
    states = of_rank(DEEPSPEED, psi, stage, gpus * nodes)
    live = of_rank(DEEPSPEED, layer, 0, 1)
    whole = of_rank(OURS, psi, 0, 1).weights
    if stage == 2:
        if offload:
            return states.weights, HOST_BUFFERS * gpus * nodes * max(states.optimizer, whole)
        return states.total, HOST_BUFFERS * gpus * whole
    gathered, sharded = live.weights + live.gradients, states.weights + states.optimizer
    on_gpu = {"": sharded, "optimizer": states.weights, "optimizer, param": 0.0}[offload]
    made = 0.0 if init else whole
    if init and not offload:
        made = of_rank(OURS, layer, 0, 1).weights
    return gathered + on_gpu, HOST_BUFFERS * gpus * max(sharded - on_gpu, made)


T5_3B, T5_3B_LARGEST = 2_851_598_336, 32128 * 1024  # "2851M total params, 32M largest layer params"


@pytest.mark.parametrize(
    "stage, offload, init, per_cpu, per_gpu",
    [
        (2, "optimizer", False, 127.48, 5.31),
        (3, "optimizer, param", True, 71.71, 0.12),
        (3, "optimizer, param", False, 127.48, 0.12),
        (3, "optimizer", True, 63.74, 0.79),
        (3, "optimizer", False, 127.48, 0.79),
        (3, "", True, 1.47, 6.10),
        (3, "", False, 127.48, 6.10),
    ],
)
def test_deepspeeds_documented_example(stage: int, offload: str, init: bool, per_cpu: float, per_gpu: float) -> None:
    """T5-3B on one node of 8 GPUs; a gigabyte is 2**30 bytes there."""
    gpu, host = deepspeeds_estimate(T5_3B, T5_3B_LARGEST, stage, 8, 1, offload, init)
    assert (round(host / 2**30, 2), round(gpu / 2**30, 2)) == (per_cpu, per_gpu)


def test_deepspeeds_documented_zero_2_leaves_gradients_whole() -> None:
    """4 Psi + 16 Psi / N in its text, which is our stage 1; its program says 2 Psi + 18 Psi / N."""
    assert round(of_rank(DEEPSPEED, T5_3B, 1, 8).total / 2**30, 2) == 15.93


@pytest.fixture(scope="module")
def estimators() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """DeepSpeed's own, of stages 2 and 3."""
    stage_2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    stage_3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    return stage_2.estimate_zero2_model_states_mem_needs, stage_3.estimate_zero3_model_states_mem_needs


@given(
    psi=st.integers(10**6, 10**12),
    part=st.floats(0.001, 1),
    gpus=st.integers(1, 16),
    nodes=st.integers(1, 64),
    offload=st.sampled_from(["", "optimizer", "optimizer, param"]),
    init=st.booleans(),
)
def test_deepspeeds_estimators(
    estimators: Any, psi: int, part: float, gpus: int, nodes: int, offload: str, init: bool
) -> None:
    zero_2, zero_3 = estimators
    layer = int(psi * part)
    host, gpu, _ = zero_3(psi, layer, gpus, nodes, bool(offload), "param" in offload, init)
    assert deepspeeds_estimate(psi, layer, 3, gpus, nodes, offload, init) == pytest.approx((gpu, host), abs=1)
    host, gpu = zero_2(psi, gpus, nodes, bool(offload))
    assert deepspeeds_estimate(psi, layer, 2, gpus, nodes, offload) == pytest.approx((gpu, host), abs=1)


def test_views_of_one_storage_count_once() -> None:
    storage = torch.zeros(10, dtype=torch.float64)
    assert nbytes([storage[:3], storage[2:].view(2, 4), torch.zeros(3, dtype=torch.bfloat16)]) == 80 + 6
    assert nbytes([]) == 0


def states_of(configs: list[EngineConfig]) -> list[ModelStates]:
    """What this rank holds after a step, without the optimizer's step counts: of every trained parameter, and one."""
    found = []
    for config in configs:
        grid = build_grid(config.parallel, torch.device("cpu"))
        engine = Engine(config, grid)
        assert engine.model_states().gradients == 0
        engine.train_step(share(global_batch(config, 0), grid, config.batch.micro_batch_size), LR, measure=True)
        states = engine.model_states()
        counts = 4 * (1 + sum(local.numel() > 0 for local in engine.optimizer._locals.values()))
        found.append(dataclasses.replace(states, optimizer=states.optimizer - counts))
    return found


def zero_1_to_3(**options: Any) -> list[EngineConfig]:
    return [tiny(num_layers=2, zero_stage=stage, **options) for stage in (1, 2, 3)]


def by_rank(
    pool: Pool, world_size: int, configs: list[EngineConfig], ranks: Sequence[int] | None = None
) -> list[tuple[ModelStates, ...]]:
    """For every configuration what these ranks hold (by default the first and the last)."""
    return list(zip(*pool.run_fake(states_of, world_size, configs, ranks=ranks), strict=True))


@pytest.mark.parametrize("dp", sweep((2, 4, 8), {2}))
def test_every_rank_holds_what_the_formula_says(pool: Pool, dp: int) -> None:
    """To the byte, also in bf16, where what is stored, reduced and updated is float32 all the same, and on the host."""
    configs = [tiny(num_layers=2, zero_stage=0), *zero_1_to_3(), *zero_1_to_3(bf16=True)]
    configs += zero_1_to_3(offload_optimizer="cpu")
    for config, ranks in zip(configs, by_rank(pool, dp, configs), strict=True):
        expected = of_rank(OURS, parameters(config.model), config.zero.zero_stage, dp)
        assert set(ranks) == {expected}


def test_hybrid_sharding_divides_by_the_shards(pool: Pool) -> None:
    configs = zero_1_to_3(zero_shard_size=2)
    for config, ranks in zip(configs, by_rank(pool, 4, configs), strict=True):
        assert set(ranks) == {of_rank(OURS, parameters(config.model), config.zero.zero_stage, 2)}


def test_pipeline_and_tensor_parallelism_divide_first(pool: Pool) -> None:
    """TP2 x PP2 x DP2: each place has half of its stage's matrices and all of its norms; together, the whole model."""
    options: dict[str, Any] = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "micro_batch_size": 4,
    }
    configs = [tiny(num_layers=2, zero_stage=0, **options), *zero_1_to_3(**options)]
    model = configs[0].model
    matrices, layer = matmul_parameters_per_layer(model), parameters_per_layer(model)
    vocabulary, norm = model.vocab_size * model.hidden_size, model.hidden_size
    places = [vocabulary / 2 + matrices / 2 + layer - matrices, vocabulary / 2 + matrices / 2 + layer - matrices + norm]
    assert 2 * sum(places) == parameters(model) + 5 * norm  # a second copy of the norms
    for config, ranks in zip(configs, by_rank(pool, 8, configs, [0, 3, 4, 7]), strict=True):
        for pp, place in enumerate(places):
            assert set(ranks[2 * pp : 2 * pp + 2]) == {of_rank(OURS, place, config.zero.zero_stage, 2)}


def test_what_does_not_divide_is_padded_but_not_in_the_optimizer(pool: Pool) -> None:
    """97 rows over two ranks: both have room for 49 in weights and gradients; there are moments of 49 and 48."""
    configs = zero_1_to_3(vocab_size=97)
    rows = 2 * 32  # one of each matrix
    psi = parameters(configs[0].model)
    for first, second in by_rank(pool, 2, configs):
        padded = of_rank(OURS, psi + rows, 3, 2)
        assert first == padded
        assert second == dataclasses.replace(padded, optimizer=padded.optimizer - 8 * rows)


def test_frozen_parameters_are_only_weights(pool: Pool) -> None:
    configs = zero_1_to_3(train_only="embeddings")
    psi, vocabulary = parameters(configs[0].model), 96 * 32
    for ranks in by_rank(pool, 2, configs):
        assert set(ranks) == {OURS.of_rank(ModelStates(psi, vocabulary, vocabulary), 3, 2)}


def test_optimizer_states_of_new_rows_stand_where_the_rows_are(pool: Pool) -> None:
    """Of 96 rows over two ranks the last 32 are trained: all on the second."""
    configs = zero_1_to_3(train_only="new-rows", base_vocab_size=64)
    for first, second in by_rank(pool, 2, configs):
        assert first.gradients == second.gradients == 4 * 96 * 32 / 2
        assert (first.optimizer, second.optimizer) == (0, 8 * 32 * 32)


def test_a_tied_matrix_on_two_stages_is_there_twice(pool: Pool) -> None:
    options = {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": False}
    configs = [tiny(num_layers=2, **options)]
    (ranks,) = by_rank(pool, 2, configs)
    psi = parameters(configs[0].model) + 96 * 32
    total = [sum(values) for values in zip(*map(dataclasses.astuple, ranks), strict=True)]
    assert ModelStates(*total) == of_rank(OURS, psi, 0, 1)
