"""Every layout trains the same model: loss, gradient norm and weights against one process, step by step.

In float64, where rounding cannot hide a bug, and in float32. Gradient norms are compared because AdamW hides a
wrong scale of the gradient from the loss almost completely. The one process is itself held against transformers
and torch.optim.AdamW. Figures are printed: `pytest -rP` shows them.
"""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from megatron_ext.engine import BatchConfig, Engine, EngineConfig
from megatron_ext.mesh import build_grid
from megatron_ext.optim import LossScaler, PrecisionConfig
from tests.distributed import Pool
from tests.megatron_ext.hugging_face import llama_like
from tests.megatron_ext.layouts import SHALLOW, Layout, Reference, assert_parity, layout
from tests.megatron_ext.training import (
    LR,
    STEPS,
    VALID,
    Run,
    global_batch,
    initial_weights,
    one_process,
    share,
    tiny,
    train,
    whole_parameters,
    worst,
)
from tests.slow import sweep

TIED: dict[str, Any] = {"untie_embeddings_and_output_weights": False}
BIASED: dict[str, Any] = {"add_qkv_bias": True, "add_bias_linear": True}
ACCUMULATED: dict[str, Any] = {"zero": 3, "accumulate_then_reduce": True}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev")
MASKED = ("gpipe", "interleaved", "dualpipev")
# Half of them on documents with uneven masks, `documents=True`: the one process has no microbatch to weigh.
LAYOUTS: dict[str, Layout] = {
    "TP2": layout(tp=2),
    "TP2 SP": layout(tp=2, sp=True, documents=True),
    "TP4, 2 KV heads": layout(tp=4, num_query_groups=2),
    "TP4 SP, 2 KV heads, biases": layout(tp=4, sp=True, num_query_groups=2, **BIASED),
    "TP2, vocabulary 997": layout(tp=2, vocab_size=997),
    **{f"PP2 {schedule}": layout(pp=2, schedule=schedule, documents=schedule in MASKED) for schedule in SCHEDULES},
    "PP2 zero-bubble, 2 stages a rank": layout(pp=2, schedule="zero-bubble", num_virtual_stages_per_pipeline_rank=2),
    "PP3 of 3,2,2 layers": layout(pp=3, num_layers=7, pipeline_layers=(3, 2, 2), documents=True),
    **{f"DP{dp} ZeRO-{zero}": layout(dp=dp, zero=zero, documents=dp == 4) for dp in (2, 4) for zero in range(4)},
    **{
        f"DP4 in shards of 2, ZeRO-{zero}": layout(dp=4, zero=zero, zero_shard_size=2, documents=zero == 2)
        for zero in (1, 2, 3)
    },
    **{f"TP2 PP2 DP2 SP ZeRO-{zero}": layout(2, 2, 2, zero=zero, sp=True, documents=zero == 3) for zero in range(4)},
    **{
        f"PP2 DP2 {schedule} ZeRO-{zero}": layout(pp=2, dp=2, schedule=schedule, zero=zero, documents=zero == 2)
        for schedule in ("zero-bubble", "zbv", "interleaved")
        for zero in (2, 3)
    },
    "PP2 DP4 zbv in shards of 2, ZeRO-3": layout(pp=2, dp=4, schedule="zbv", zero=3, zero_shard_size=2),
    "DP4 ZeRO-3, accumulated": layout(dp=4, documents=True, **ACCUMULATED),
    "TP2 PP2 DP2 SP ZeRO-3, accumulated": layout(2, 2, 2, sp=True, **ACCUMULATED),
    **{
        f"PP2 DP2 {schedule} ZeRO-3, accumulated": layout(pp=2, dp=2, schedule=schedule, **ACCUMULATED)
        for schedule in ("interleaved", "zero-bubble", "zbv")
    },
    "PP2 DP4 zbv in shards of 2, ZeRO-3, accumulated": layout(
        pp=2, dp=4, schedule="zbv", zero_shard_size=2, **ACCUMULATED
    ),
    "TP2 DP2 ZeRO-3, vocabulary 997": layout(tp=2, dp=2, zero=3, vocab_size=997),
    "DP2 ZeRO-1, tied": layout(dp=2, zero=1, **TIED),
    "DP2 ZeRO-3, tied": layout(dp=2, zero=3, **TIED),
    "PP2 1f1b, tied": layout(pp=2, documents=True, **TIED),
    "PP2 zbv, tied": layout(pp=2, schedule="zbv", **TIED),
    "PP2 DP2 ZeRO-1, tied": layout(pp=2, dp=2, zero=1, **TIED),
    "TP2 PP2 DP2 ZeRO-3, tied": layout(2, 2, 2, zero=3, **TIED),
    "PP2 DP2 zbv ZeRO-3, tied": layout(pp=2, dp=2, schedule="zbv", zero=3, **TIED),
    "PP2 DP2 zbv ZeRO-3, tied, accumulated": layout(pp=2, dp=2, schedule="zbv", documents=True, **TIED, **ACCUMULATED),
    "PP2 1f1b, recompute full": layout(pp=2, recompute_granularity="full"),
    "PP2 zero-bubble, recompute full": layout(
        pp=2, schedule="zero-bubble", recompute_granularity="full", documents=True
    ),
    "PP2 zero-bubble, recompute selective": layout(pp=2, schedule="zero-bubble", recompute_granularity="selective"),
    "TP2 DP2 SP ZeRO-3, recompute full": layout(
        tp=2, dp=2, sp=True, zero=3, recompute_granularity="full", documents=True
    ),
    "TP2 DP2 ZeRO-1, recompute selective": layout(tp=2, dp=2, zero=1, recompute_granularity="selective"),
    "TP2 DP2 SP ZeRO-1, biases": layout(tp=2, dp=2, sp=True, zero=1, **BIASED),
    "TP2 PP2 SP": layout(tp=2, pp=2, sp=True, documents=True),
}
# Every axis, schedule, stage and kind of batch is in one of these, most pairs too; the rest wait for the long run.
FLOAT64_BY_DEFAULT = {
    *("TP2 SP", "TP4 SP, 2 KV heads, biases", "PP3 of 3,2,2 layers"),
    *("PP2 gpipe", "PP2 interleaved", "PP2 dualpipev", "PP2 zero-bubble, recompute full"),
    *("DP4 ZeRO-0", "DP4 ZeRO-1", "DP4 in shards of 2, ZeRO-2"),
    *("TP2 PP2 DP2 SP ZeRO-3", "TP2 DP2 ZeRO-3, vocabulary 997", "TP2 DP2 SP ZeRO-3, recompute full"),
    "PP2 DP2 zbv ZeRO-3, tied, accumulated",
}
# What float32 adds is rounding, which the number of ranks and the order of sums change and the schedule does not.
FLOAT32_BY_DEFAULT = {"DP4 in shards of 2, ZeRO-2"}
assert LAYOUTS.keys() >= FLOAT64_BY_DEFAULT | FLOAT32_BY_DEFAULT
BY_DEFAULT = {("float64", name) for name in FLOAT64_BY_DEFAULT} | {("float32", name) for name in FLOAT32_BY_DEFAULT}


@pytest.mark.parametrize("dtype, name", sweep(itertools.product(("float64", "float32"), LAYOUTS), BY_DEFAULT))
def test_layout_equals_one_process(pool: Pool, reference: Reference, dtype: str, name: str) -> None:
    case = LAYOUTS[name]
    config = tiny(params_dtype=dtype, **case.options)
    expected = reference(config, case.documents)
    runs = pool.run(train, case.ranks, config, case.documents, (0, STEPS // 2))
    assert_parity(runs, expected, name, dtype)


@pytest.mark.parametrize("options", [{}, SHALLOW])
def test_clipping_bites_on_some_steps(reference: Reference, options: dict[str, Any]) -> None:
    """The parity of the layouts proves something of clipped steps and of others."""
    config = tiny(params_dtype="float64", **options)
    clipped = reference(config).norms > config.optimizer.clip_grad
    assert 0 < clipped.sum() < STEPS


@pytest.mark.parametrize(
    "options, documents",
    [({}, True), (TIED | {"num_query_groups": 2}, False), ({"weight_decay": 0.0, "clip_grad": 0.0}, False)],
)
def test_one_process_equals_transformers_and_torch_adamw(
    pool: Pool, reference: Reference, options: dict[str, Any], documents: bool
) -> None:
    config = tiny(params_dtype="float64", **options)
    expected = reference(config, documents)
    (weights,) = pool.run(initial_weights, 1, config)
    model = llama_like(config.model, weights).double()

    optimizer = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(optimizer.adam_beta1, optimizer.adam_beta2), eps=optimizer.adam_eps)

    def summed_loss(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the tokens, by their weights; and the sum of these."""
        batch = global_batch(config, step, documents)
        attention = None
        if documents:
            ids = batch["document_ids"]
            attention = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
        logits = model(batch["tokens"], attention_mask=attention, position_ids=batch.get("position_ids")).logits
        of_tokens = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        weights = batch.get("loss_mask", torch.ones(1)).double().expand_as(batch["labels"]).flatten()
        return of_tokens @ weights, weights.sum()

    losses, norms = [], []
    for step in range(STEPS):
        summed, tokens = summed_loss(step)
        loss = summed / tokens if tokens else summed * 0
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad or float("inf"))
        adam.step()
        adam.zero_grad()
        losses.append(loss.detach())
        norms.append(norm.detach())
    assert worst(expected.losses, torch.stack(losses)) <= 1e-9
    assert worst(expected.norms, torch.stack(norms)) <= 1e-9
    with torch.no_grad():
        summed, tokens = torch.tensor([summed_loss(step) for step in VALID], dtype=torch.float64).sum(0)
    assert expected.valid_loss == pytest.approx((summed / tokens).item(), rel=1e-9)


BF16 = 1e-3, 1e-2  # bounds of relative differences from float32: of losses, of gradient norms
HALF_LAYOUTS = {
    "one process": layout(),
    "TP2 SP": layout(tp=2, sp=True),
    "PP2 DP2 zero-bubble ZeRO-1": layout(pp=2, dp=2, schedule="zero-bubble", zero=1),
    "TP2 PP2 DP2 SP ZeRO-3": layout(2, 2, 2, sp=True, zero=3, documents=True),
}


HALF_BY_DEFAULT = {("bf16", "TP2 SP"), ("fp16", "one process")}


@pytest.mark.parametrize("half, name", sweep(itertools.product(("bf16", "fp16"), HALF_LAYOUTS), HALF_BY_DEFAULT))
def test_half_precision_stays_close_to_float32(pool: Pool, reference: Reference, half: str, name: str) -> None:
    case = HALF_LAYOUTS[name]
    config = tiny(**case.options)
    precision = PrecisionConfig(fp16=True, initial_loss_scale=2.0**10) if half == "fp16" else PrecisionConfig(bf16=True)
    runs = pool.run(train, case.ranks, dataclasses.replace(config, precision=precision), case.documents)
    expected = reference(config, case.documents)
    assert_close_to_float32(runs, expected, f"{name}, {half}", *{"bf16": BF16, "fp16": (2e-4, 2e-3)}[half])


def assert_close_to_float32(runs: list[Run], expected: Run, name: str, loss_bound: float, norm_bound: float) -> None:
    loss = max(worst(run.losses, expected.losses) for run in runs)
    norm = max(worst(run.norms, expected.norms) for run in runs)
    print(f"{name}: largest relative difference {loss:.1e} (loss), {norm:.1e} (gradient norm)")
    assert not runs[0].skipped.any()
    assert loss <= loss_bound
    assert norm <= norm_bound


REDUCED_IN_BF16: dict[str, Any] = {"bf16": True, "grad_reduce_in_bf16": True}
BF16_LAYOUTS = {
    **{f"DP4 ZeRO-{zero}": layout(dp=4, zero=zero, documents=True, **REDUCED_IN_BF16) for zero in (0, 3)},
    **{
        f"DP4 in shards of 2, ZeRO-{zero}": layout(dp=4, zero=zero, zero_shard_size=2, **REDUCED_IN_BF16)
        for zero in (1, 2, 3)
    },
    "DP2 ZeRO-3, accumulated": layout(dp=2, **ACCUMULATED, **REDUCED_IN_BF16),
    "PP2 DP2 zero-bubble ZeRO-1": layout(pp=2, dp=2, schedule="zero-bubble", zero=1, **REDUCED_IN_BF16),
    "TP2 PP2 DP2 SP ZeRO-2": layout(2, 2, 2, sp=True, zero=2, **REDUCED_IN_BF16),
}


# In the long run: what is accumulated and what travels is compared exactly below.
@pytest.mark.parametrize("name", sweep(BF16_LAYOUTS, ()))
def test_gradients_that_travel_in_bfloat16_stay_close_to_float32(pool: Pool, reference: Reference, name: str) -> None:
    case = BF16_LAYOUTS[name]
    config = tiny(**case.options)
    runs = pool.run(train, case.ranks, config, case.documents)
    expected = reference(dataclasses.replace(config, precision=PrecisionConfig()), case.documents)
    assert_close_to_float32(runs, expected, name, *BF16)


def gradients_of_equal_samples(config: EngineConfig) -> dict[str, torch.Tensor]:
    """Of a batch that repeats one sample. Collective."""
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    rows = config.batch.microbatches(grid.dp_size) * config.batch.micro_batch_size
    sample = {name: tensor[:1] for name, tensor in global_batch(config, 0).items()}
    engine.pipeline.forward_backward({name: tensor.repeat(rows, 1) for name, tensor in sample.items()})
    return {name: _whole_gradient(param) for name, param in engine.parameters.items()}


def _whole_gradient(param: torch.nn.Parameter) -> torch.Tensor:
    assert isinstance(param.grad, DTensor)
    return param.grad.full_tensor()


ACCUMULATING = {name: case for name, case in BF16_LAYOUTS.items() if "TP2" not in name} | {
    # whose last microbatches' gradients come one after the other, without a pass of FSDP's own between them
    "PP4 DP2 zero-bubble ZeRO-1, reduced in float32": layout(pp=4, dp=2, schedule="zero-bubble", zero=1, bf16=True)
}


@pytest.mark.parametrize("name", sweep(ACCUMULATING, {"DP4 in shards of 2, ZeRO-3", "PP2 DP2 zero-bubble ZeRO-1"}))
def test_gradients_computed_in_bfloat16_are_accumulated_in_float32(pool: Pool, name: str) -> None:
    """With equal samples every rank and microbatch has the same gradient, whose multiples bfloat16 cannot hold (3 and
    5 times need bits that it lacks) but float32 can, as both can the whole sum: it is, divided, that one gradient."""
    config = tiny(**ACCUMULATING[name].options | {"micro_batch_size": 1, "global_batch_size": 32})
    alone = dataclasses.replace(one_process(config), batch=BatchConfig(1, 1, config.batch.seq_length))
    (expected,) = pool.run(gradients_of_equal_samples, 1, alone)
    for gradients in pool.run(gradients_of_equal_samples, ACCUMULATING[name].ranks, config):
        for parameter, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, expected[parameter].bfloat16().float()), parameter


def overflowing(config: EngineConfig) -> tuple[tuple[bool, float], list[bool], float, bool]:
    """Of twelve steps from far too large a scale: whether the first changed a weight, and the scale after it; which
    were skipped, the last scale, and whether all weights are finite."""
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    before = {name: weight.clone() for name, weight in whole_parameters(engine).items()}
    first, skipped = (False, 0.0), []
    for step in range(12):
        batch = share(global_batch(config, step), grid, config.batch.micro_batch_size)
        skipped.append(bool(engine.train_step(batch, LR)[3]))
        after = whole_parameters(engine)
        if step == 0:
            first = any(not torch.equal(after[n], before[n]) for n in before), float(engine.loss_scaler.scale)
    return first, skipped, float(engine.loss_scaler.scale), all(weight.isfinite().all() for weight in after.values())


@pytest.mark.parametrize("name", sweep(HALF_LAYOUTS, {"one process", "PP2 DP2 zero-bubble ZeRO-1"}))
def test_overflow_skips_the_update_everywhere_and_halves_the_scale(pool: Pool, name: str) -> None:
    case = HALF_LAYOUTS[name]
    config = tiny(fp16=True, initial_loss_scale=2.0**24, hysteresis=1, **case.options)
    runs = pool.run(overflowing, case.ranks, config)
    for first, skipped, scale, finite in runs:
        assert first == (False, 2.0**23)
        assert skipped == runs[0][1]
        assert skipped[0]
        assert not all(skipped)  # the scale came down to where training goes on
        assert scale == 2.0 ** (24 - sum(skipped))
        assert finite


def test_loss_scale_waits_for_hysteresis_and_grows_after_a_window() -> None:
    config = PrecisionConfig(fp16=True, initial_loss_scale=16.0, hysteresis=2, loss_scale_window=3, min_loss_scale=4.0)
    scaler = LossScaler(config, torch.device("cpu"))
    scales = []
    for overflow in (1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1):
        scaler.update(torch.tensor(float(overflow)))
        scales.append(float(scaler.scale))
    assert scales == [16, 8, 8, 8, 16, 16, 8, 4, 4, 4, 4]
