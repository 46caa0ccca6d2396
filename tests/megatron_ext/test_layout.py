"""Which layers stand where, and that initial weights do not depend on it."""

import itertools
from typing import Any

import pytest
import torch

from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import build_grid
from megatron_ext.models import ModelConfig, StageSpec, preset
from megatron_ext.models.count import matmul_parameters_per_layer
from megatron_ext.pipeline import PipelineConfig, StageLayout, plan_stages
from megatron_ext.pipeline.layout import balanced_layers
from tests.distributed import Pool
from tests.megatron_ext.training import tiny, whole_parameters


def model(layers: int, vocab: int = 96) -> ModelConfig:
    return tiny(num_layers=layers, vocab_size=vocab).model


def plan(layers: int, pp: int, schedule: str | None = None, microbatches: int = 16, **options: Any) -> StageLayout:
    return plan_stages(PipelineConfig(schedule, **options), model(layers), pp, microbatches)


def slowest(config: ModelConfig, counts: tuple[int, ...]) -> int:
    """Matrix products per token of the slowest stage."""
    layer, head = matmul_parameters_per_layer(config), config.vocab_size * config.hidden_size
    return max(max(counts[:-1], default=0) * layer, counts[-1] * layer + head)


@pytest.mark.parametrize("vocab", [96, 1000, 5000, 20000])
@pytest.mark.parametrize("layers, stages", [(4, 2), (7, 3), (8, 4), (9, 4), (10, 1)])
def test_balanced_layers_are_as_fast_as_any(layers: int, stages: int, vocab: int) -> None:
    config = model(layers, vocab)
    counts = balanced_layers(config, stages)
    every_cut = (c for c in itertools.product(range(1, layers + 1), repeat=stages) if sum(c) == layers)
    assert len(counts) == stages
    assert sum(counts) == layers
    assert slowest(config, counts) == min(slowest(config, cut) for cut in every_cut)


def test_a_huge_vocabulary_takes_layers_from_the_last_stage() -> None:
    assert balanced_layers(model(8, vocab=96), 4) == (2, 2, 2, 2)
    *others, last = balanced_layers(model(8, vocab=20000), 4)
    assert last == 1
    assert max(others) - min(others) <= 1
    # The head of Llama 3 costs 2.4 of its layers; among equally fast stages, the one with the embedding has fewer.
    assert balanced_layers(preset("llama3-8b"), 4) == (8, 9, 9, 6)


def test_named_layers_are_taken_as_given() -> None:
    assert plan(7, 3, pipeline_layers=(3, 2, 2)).stages == (
        StageSpec(0, 3, True, False),
        StageSpec(3, 5, False, False),
        StageSpec(5, 7, False, True),
    )


@pytest.mark.parametrize(
    "schedule, options, ranks",
    [
        (None, {}, (0, 1)),
        ("interleaved", {}, (0, 1, 0, 1)),
        ("interleaved", {"num_virtual_stages_per_pipeline_rank": 3}, (0, 1, 0, 1, 0, 1)),
        ("zero-bubble", {}, (0, 1)),
        ("zbv", {}, (0, 1, 1, 0)),
        ("dualpipev", {}, (0, 1, 1, 0)),
    ],
)
def test_stages_are_dealt_to_the_ranks(schedule: str | None, options: dict[str, Any], ranks: tuple[int, ...]) -> None:
    layout = plan(8, 2, schedule, **options)
    assert layout.rank_of == ranks
    assert sorted(layout.on_rank(0) + layout.on_rank(1)) == list(range(len(ranks)))
    assert [s.has_embedding for s in layout.stages] == [True] + [False] * (len(ranks) - 1)
    assert [s.has_head for s in layout.stages] == [False] * (len(ranks) - 1) + [True]
    for before, after in itertools.pairwise(layout.stages):
        assert before.first < before.last == after.first
    assert layout.stages[0].first == 0
    assert layout.stages[-1].last == 8


@pytest.mark.parametrize(
    "layers, pp, schedule, microbatches, options, flag",
    [
        (4, 8, None, 16, {}, "--pipeline-model-parallel-size 8"),
        (4, 4, "zbv", 16, {}, "--num-layers 4"),
        (7, 3, None, 16, {"pipeline_layers": (3, 2, 3)}, "--pipeline-layers 3,2,3 sums to 8"),
        (7, 3, None, 16, {"pipeline_layers": (4, 3)}, "--pipeline-layers 4,3 names 2 stages"),
        (7, 3, None, 16, {"pipeline_layers": (7, 0, 0)}, "every stage needs at least one"),
        (4, 4, "1f1b", 3, {}, "--pipeline-schedule 1f1b needs at least as many microbatches"),
        (8, 4, "interleaved", 9, {}, "--pipeline-schedule interleaved needs at least PP"),
        (8, 4, "zero-bubble", 3, {}, "--pipeline-schedule zero-bubble"),
        (8, 4, "dualpipev", 7, {}, "--pipeline-schedule dualpipev needs at least 8"),
        (8, 2, "zbv", 16, {"num_virtual_stages_per_pipeline_rank": 3}, "--num-virtual-stages-per-pipeline-rank 3"),
        (8, 2, "interleaved", 16, {"num_virtual_stages_per_pipeline_rank": 1}, "needs at least 2"),
        (8, 1, "1f1b", 16, {}, "--pipeline-schedule needs --pipeline-model-parallel-size"),
    ],
)
def test_impossible_layouts_are_refused(
    layers: int, pp: int, schedule: str | None, microbatches: int, options: dict[str, Any], flag: str
) -> None:
    with pytest.raises(RequestError) as refusal:
        plan(layers, pp, schedule, microbatches, **options)
    assert flag in str(refusal.value)
    assert "\n" not in str(refusal.value)


def initial_weights(config: EngineConfig) -> dict[str, torch.Tensor]:
    return whole_parameters(Engine(config, build_grid(config.parallel, torch.device("cpu"))))


@pytest.mark.parametrize(
    "ranks, options",
    [
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (4, {"zero_stage": 3}),
        (4, {"tensor_model_parallel_size": 2, "zero_stage": 1}),
        (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"}),
    ],
)
def test_initial_weights_do_not_depend_on_the_layout(pool: Pool, ranks: int, options: dict[str, Any]) -> None:
    shape = {"vocab_size": 2503, "num_query_groups": 2, "add_bias_linear": True}  # several blocks of rows, uneven
    (expected,) = pool.run(initial_weights, 1, tiny(**shape))
    everywhere = pool.run(initial_weights, ranks, tiny(**shape, **options))
    assert set().union(*everywhere) == set(expected)
    for weights in everywhere:
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_initial_weights_follow_the_seed_and_the_depth(pool: Pool) -> None:
    config = tiny(vocab_size=2503, init_method_std=0.02)
    (weights,) = pool.run(initial_weights, 1, config)
    assert weights["embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    residual = torch.cat([w.flatten() for name, w in weights.items() if name.endswith("down_proj.weight")])
    assert residual.std().item() == pytest.approx(0.02 / (2 * config.model.num_layers) ** 0.5, rel=0.05)
    matrices = [w.flatten()[:64] for w in weights.values() if w.ndim == 2]  # no two parameters, no two blocks alike
    matrices += [weights["embed_tokens.weight"][start].repeat(2) for start in (1024, 2048)]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)
