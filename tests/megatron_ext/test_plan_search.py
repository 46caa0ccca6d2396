"""The search finds what trying everything finds, and costs behave as physics has it."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.engine import BatchConfig, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, StageSpec, preset
from megatron_ext.optim import PrecisionConfig
from megatron_ext.planner.choices import Choice, choice_of, choices, configured
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.gpus import gpu_named, gpu_names, gpu_reported_as
from megatron_ext.planner.layer import layer_times, product
from megatron_ext.planner.plan import Plan
from megatron_ext.planner.program import MEGATRON_ZH, program_named
from megatron_ext.planner.reasons import alternatives
from megatron_ext.planner.search import Search
from megatron_ext.planner.step import least_time, microbatch_of

_LAYERS = StageSpec(0, 10, has_embedding=False, has_head=False)
_A800 = gpu_named("a800-80g")
_SHAPE = ModelConfig(num_layers=10, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, vocab_size=49953)


def base(model: ModelConfig = _SHAPE, global_batch: int = 64, length: int = 2048) -> EngineConfig:
    return EngineConfig(model, batch=BatchConfig(1, global_batch, length), precision=PrecisionConfig(bf16=True))


@pytest.fixture(scope="module")
def small() -> Search:
    return Search(base(), Cluster(_A800, 8), MEGATRON_ZH)


def plans_of(search: Search) -> list[Plan]:
    return [Plan(configured(search.base, choice), search.cluster, search.program) for choice in search.choices]


def test_the_fastest_is_that_of_all(small: Search) -> None:
    everything = [plan for plan in plans_of(small) if small.fits(plan)]
    best = min(plan.step.seconds for plan in everything)
    found = small.fastest(5)
    assert found[0].step.seconds <= best  # layers may be spread better than evenly
    seconds = [plan.step.seconds for plan in found]
    assert seconds == sorted(seconds)
    assert all(small.fits(plan) for plan in found)


def test_the_smallest_is_that_of_all(small: Search) -> None:
    least = min(plan.fullest for plan in plans_of(small))
    assert small.smallest()[0].fullest == pytest.approx(least, abs=2**20)


@pytest.mark.slow
def test_no_step_is_faster_than_its_bound(small: Search) -> None:
    for plan in plans_of(small):
        assert least_time(plan.config, plan.cluster, plan.program) <= plan.step.seconds * (1 + 1e-9)


def test_every_choice_is_accepted_by_the_engine(small: Search) -> None:
    """And stands for itself: what is searched is what is recommended."""
    assert len(set(small.choices)) == len(small.choices) > 100
    for choice in small.choices[:: len(small.choices) // 60]:
        assert choice_of(configured(small.base, choice).validate(8)) == choice


def test_a_decision_already_made_is_kept() -> None:
    allowed = {"tp": (2,), "schedule": ("1f1b",), "sequence_parallel": (False,)}
    found = list(choices(base(), Cluster(_A800, 8), allowed))
    assert found
    assert {(c.tp, c.sequence_parallel) for c in found} == {(2, False)}
    assert {c.schedule for c in found} == {"1f1b", "none"}  # "none": no pipeline, so no schedule


def test_layers_move_to_where_there_is_room() -> None:
    """OPT-66B on 24 GPUs: 64 layers do not divide by three, and an even split does not use what there is."""
    search = Search(base(preset("opt-66b"), 1024), Cluster(_A800, 24), MEGATRON_ZH, allowed={"tp": (8,), "pp": (3,)})
    best = search.fastest()[0]
    layers = best.config.pipeline.pipeline_layers
    assert search.fits(best)
    assert best.config.parallel.data_parallel_size(24) == 1
    assert layers is None or sum(layers) == 64
    even = Plan(
        dataclasses.replace(best.config, pipeline=dataclasses.replace(best.config.pipeline, pipeline_layers=None)),
        best.cluster,
        best.program,
    )
    assert best.step.seconds <= even.step.seconds or not search.fits(even)


def test_what_other_decisions_would_cost(small: Search) -> None:
    best = small.fastest()[0]
    found = alternatives(small, best, "throughput")
    chosen = choice_of(best.config)
    for aspect in ("tp", "pp", "zero", "micro_batch", "recompute"):
        values = {getattr(c, aspect) for c in small.choices}
        assert {a.value for a in found if a.aspect == aspect} == values - {getattr(chosen, aspect)}
    for alternative in found:
        assert getattr(choice_of(alternative.plan.config), alternative.aspect) == alternative.value
        assert alternative.fits == small.fits(alternative.plan)
        assert alternative.plan.step.seconds >= best.step.seconds or not alternative.fits


_NCCL = {  # GPUs, bytes: microseconds of an all-reduce on A100 with NVSwitch, nccl-tests by vTrain (arXiv 2312.12391)
    (2, 2**20): 44.2,
    (2, 2**26): 404.7,
    (2, 2**30): 5442.8,
    (4, 2**20): 51.4,
    (4, 2**26): 543.8,
    (4, 2**30): 7259.4,
    (8, 2**20): 92.8,
    (8, 2**26): 579.9,
    (8, 2**30): 8193.0,
}


@pytest.mark.parametrize(("gpus", "size"), _NCCL)
def test_all_reduce_in_a_node(gpus: int, size: int) -> None:
    predicted = Cluster(gpu_named("a100-80g"), 8).all_reduce(gpus, 1, size) * 1e6
    assert predicted == pytest.approx(_NCCL[gpus, size], rel=0.3)


def test_best_products() -> None:
    """The best matrix product of A100: 271 of 312 TFLOP/s (ml-engineering's table of achievable FLOPS)."""
    gpu, n = gpu_named("a100-80g"), 16384
    assert 2 * n**3 / product(gpu, n, n, n) / 1e12 == pytest.approx(271, rel=0.03)


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    size=st.sampled_from([1, 2, 4]),
    recompute=st.sampled_from([None, "selective", "full"]),
)
def test_a_layer_gets_no_cheaper_by_more_work(tp: int, size: int, recompute: str | None) -> None:
    config = configured(base(), Choice(tp, 1, tp > 1, 1, "none", 1, size, recompute))
    cluster = Cluster(_A800, 8)
    times = layer_times(microbatch_of(config, _LAYERS), cluster, MEGATRON_ZH)
    larger = dataclasses.replace(microbatch_of(config, _LAYERS), size=2 * size)
    for one, two in zip(times, layer_times(larger, cluster, MEGATRON_ZH), strict=True):
        assert one.total <= two.total <= 2 * one.total * (1 + 1e-9)
    assert (times.again.total > 0) == (recompute is not None)
    assert times.again.total <= times.forward.total


def test_messages_between_nodes_take_longer() -> None:
    cluster = Cluster(_A800, 64)
    sizes = [2**20, 2**24, 2**28]
    for size, (small, large) in itertools.product(sizes, itertools.pairwise([2, 4, 8, 16, 64])):
        assert cluster.all_reduce(small, 1, size) < cluster.all_reduce(large, 1, size)
    assert cluster.ring(1, 1, 2**20) == 0


def test_gpus_by_name() -> None:
    assert gpu_named("H200").name == "h200-141g"
    assert len(set(gpu_names())) == len(gpu_names())
    for device, name in (
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A800-SXM4-80GB", "a800-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100pcie-80g"),
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA GeForce RTX 4090", "4090-24g"),
    ):
        gpu = gpu_reported_as(device)
        assert gpu is not None
        assert gpu.name == name
    assert gpu_reported_as("AMD Instinct MI300X") is None
    for wrong in ("a100", "z9"):
        with pytest.raises(RequestError, match=f"--gpu {wrong}: (ambiguous|unknown)"):
            gpu_named(wrong)
    with pytest.raises(RequestError, match="--program x: unknown"):
        program_named("x")
