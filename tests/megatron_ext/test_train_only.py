"""Training a part of the model: the same losses and gradient norms at every layout, and nothing else changes."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import build_grid
from megatron_ext.models import parameter_shapes
from megatron_ext.optim import TrainableConfig
from megatron_ext.optim.trainable import describe, select
from tests.distributed import Pool
from tests.megatron_ext.hugging_face import llama_like
from tests.megatron_ext.layouts import Layout, Reference, assert_parity, layout
from tests.megatron_ext.training import (
    LR,
    STEPS,
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

BASE = 61  # of 96 rows: at TP2 the new ones begin inside the second rank's
ONLY: dict[str, dict[str, Any]] = {
    "input embedding": {"train_only": "embeddings"},
    "embeddings": {"train_only": "embeddings", "train_output_embeddings": True},
    "new rows": {"train_only": "new-rows", "base_vocab_size": BASE, "train_output_embeddings": True},
    "lora": {"train_only": "lora", "lora_dropout": 0.0},
    "norms and last layer": {"train_only": "*norm.weight,layers.3.*"},
    "last layer": {"train_only": "layers.3.*"},
}
TIED: dict[str, Any] = {"untie_embeddings_and_output_weights": False}


def case(only: str, **options: Any) -> Layout:
    return layout(**{"num_layers": 4, "clip_grad": 1.5} | ONLY[only] | options)


CASES: dict[str, Layout] = {
    **{f"TP2 PP3, {only}": case(only, tp=2, pp=3, sp=True, micro_batch_size=4) for only in ONLY},
    **{f"PP2 DP2 ZeRO-{zero}, {only}": case(only, pp=2, dp=2, zero=zero) for zero in range(4) for only in ONLY},
    **{f"TP2 DP2 ZeRO-{zero}, {only}": case(only, tp=2, dp=2, zero=zero) for zero in (0, 1, 3) for only in ONLY},
    **{
        f"PP2 {schedule}, {only}": case(only, pp=2, schedule=schedule)
        for schedule in ("gpipe", "interleaved", "zero-bubble", "zbv", "dualpipev")
        for only in ("new rows", "lora", "last layer")
    },
    "TP2 PP2 zero-bubble, lora": case("lora", tp=2, pp=2, schedule="zero-bubble", micro_batch_size=4),
    "TP2 PP2 DP2 zero-bubble, lora": case("lora", tp=2, pp=2, dp=2, schedule="zero-bubble"),
    "PP2 DP2 zbv ZeRO-3, lora": case("lora", pp=2, dp=2, schedule="zbv", zero=3),
    "PP2 DP2 zero-bubble ZeRO-2, embeddings": case("embeddings", pp=2, dp=2, schedule="zero-bubble", zero=2),
    "PP2 DP2 zbv ZeRO-3, last layer": case("last layer", pp=2, dp=2, schedule="zbv", zero=3),
    "DP4 in shards of 2, ZeRO-2, new rows": case("new rows", dp=4, zero=2, zero_shard_size=2),
    "TP4 2 KV heads, lora": case("lora", tp=4, num_query_groups=2),
    "TP4 SP 2 KV heads, lora": case("lora", tp=4, sp=True, num_query_groups=2),
    "TP2 PP2 full recomputation, lora": case("lora", tp=2, pp=2, recompute_granularity="full"),
    **{
        f"PP2 DP2 {schedule} ZeRO-1, tied, {only}": layout(
            pp=2, dp=2, schedule=schedule, zero=1, **TIED, **{k: v for k, v in ONLY[only].items() if "output" not in k}
        )
        for schedule in ("1f1b", "zbv")
        for only in ("input embedding", "new rows", "last layer")
    },
}
# What is left here are the combinations that have bitten someone.
BY_DEFAULT = {
    *("PP2 DP2 ZeRO-3, lora", "TP2 DP2 ZeRO-3, new rows", "DP4 in shards of 2, ZeRO-2, new rows"),
    "PP2 zbv, new rows",
}
assert CASES.keys() >= BY_DEFAULT


Before = Callable[[EngineConfig], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def before(pool: Pool) -> Before:
    """The initial weights, which no layout changes, computed once for each model and precision."""
    known: dict[EngineConfig, dict[str, torch.Tensor]] = {}

    def weights(config: EngineConfig) -> dict[str, torch.Tensor]:
        key = one_process(config)
        if key not in known:
            (known[key],) = pool.run(initial_weights, 1, key)
        return known[key]

    return weights


@pytest.mark.parametrize(
    "dtype, name",
    sweep(itertools.product(("float64", "float32"), CASES), {("float64", name) for name in BY_DEFAULT}),
)
def test_layout_equals_one_process(pool: Pool, reference: Reference, before: Before, dtype: str, name: str) -> None:
    config = tiny(params_dtype=dtype, **CASES[name].options)
    expected = reference(config)
    runs = pool.run(train, CASES[name].ranks, config, False, (0, STEPS // 2))
    assert_parity(runs, expected, name, dtype)
    for run in runs:
        assert_only_the_trained_changed(run, before(config), config.trainable, tied=config.model.tied)


def assert_only_the_trained_changed(
    run: Run, before: dict[str, torch.Tensor], trainable: TrainableConfig, tied: bool
) -> None:
    for name, weight in run.parameters.items():
        name = "embed_tokens.weight" if tied and name == "lm_head.weight" else name
        if not trainable.trains(name):
            assert torch.equal(weight, before[name]), name
        else:
            first = trainable.first_row(name)
            assert torch.equal(weight[:first], before[name][:first]), name
            assert not torch.equal(weight[first:], before[name][first:]), name


@pytest.mark.parametrize("only", ["input embedding", "embeddings", "new rows", "last layer"])
def test_one_process_equals_transformers_with_frozen_weights(pool: Pool, reference: Reference, only: str) -> None:
    """Of new rows: old ones get no gradient and are put back after each step of torch.optim.AdamW."""
    config = tiny(params_dtype="float64", **ONLY[only])
    (weights,) = pool.run(initial_weights, 1, config)
    model = llama_like(config.model, weights).double()
    chosen = []
    for name, param in model.named_parameters():
        param.requires_grad_(config.trainable.trains(name.removeprefix("model.")))
        if param.requires_grad:
            chosen.append((param, config.trainable.first_row(name.removeprefix("model."))))

    optimizer = config.optimizer
    groups = [
        {"params": [p for p, _ in chosen if p.ndim == 2], "weight_decay": optimizer.weight_decay},
        {"params": [p for p, _ in chosen if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(optimizer.adam_beta1, optimizer.adam_beta2), eps=optimizer.adam_eps)
    losses, norms = [], []
    for step in range(STEPS):
        batch = global_batch(config, step)
        loss = F.cross_entropy(model(batch["tokens"]).logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        old = [param.detach()[:row].clone() for param, row in chosen]
        for param, row in chosen:
            assert param.grad is not None
            param.grad[:row] = 0
        norms.append(torch.nn.utils.clip_grad_norm_([p for p, _ in chosen], optimizer.clip_grad).detach())
        adam.step()
        adam.zero_grad()
        for (param, row), rows in zip(chosen, old, strict=True):
            param.detach()[:row] = rows
        losses.append(loss.detach())
    expected = reference(config)
    assert worst(expected.losses, torch.stack(losses)) <= 1e-9
    assert worst(expected.norms, torch.stack(norms)) <= 1e-9


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "gate_proj", "up_proj", "down_proj")])
def test_adapters_equal_transformers_with_merged_weights(
    pool: Pool, reference: Reference, targets: tuple[str, ...]
) -> None:
    """W + alpha / rank (A^T B)^T in place of every target's W, differentiated by autograd through the sum."""
    config = tiny(params_dtype="float64", lora_target_modules=targets, lora_rank=4, lora_alpha=6.0, **ONLY["lora"])
    (weights,) = pool.run(initial_weights, 1, config)
    adapters = {name: w.clone().requires_grad_() for name, w in weights.items() if ".lora." in name}
    assert len(adapters) == 2 * len(targets) * config.model.num_layers
    model = llama_like(config.model, {name: w for name, w in weights.items() if name not in adapters}).double()
    model.requires_grad_(False)
    trained = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]  # type: ignore[operator]
    for param in trained:
        param.requires_grad_()
    originals = dict(model.named_parameters())

    def merged() -> dict[str, torch.Tensor]:
        products = {}
        for name in adapters:
            if name.endswith(".lora.a"):
                linear = name.removesuffix(".lora.a")
                change = config.lora.scale * (adapters[f"{linear}.lora.b"].T @ adapters[name])
                products[f"model.{linear}.weight"] = originals[f"model.{linear}.weight"] + change
        return products

    optimizer = config.optimizer
    params = [*trained, *adapters.values()]
    adam = torch.optim.AdamW(
        params,
        lr=LR,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
    )
    losses, norms = [], []
    for step in range(STEPS):
        batch = global_batch(config, step)
        logits = torch.func.functional_call(model, merged(), (batch["tokens"],)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(params, optimizer.clip_grad).detach())
        adam.step()
        adam.zero_grad()
        losses.append(loss.detach())
    expected = reference(config)
    assert worst(expected.losses, torch.stack(losses)) <= 1e-9
    assert worst(expected.norms, torch.stack(norms)) <= 1e-9


def figures_with_dropout(config: Any) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    grid = build_grid(config.parallel, torch.device("cpu"))
    torch.manual_seed(config.seed + grid.random_stream)
    engine = Engine(config, grid)
    batch = share(global_batch(config, 0), grid, config.batch.micro_batch_size)
    trained = [engine.train_step(batch, LR)[0].item() for _ in range(3)]
    evaluated = [engine.evaluate([batch]).item() for _ in range(2)]
    return trained, evaluated, whole_parameters(engine)


def test_adapter_dropout_is_one_for_a_tensor_parallel_group_and_off_in_evaluation(pool: Pool) -> None:
    """Replicated weights of an adapter stay equal on all ranks only if all of them drop the same elements."""
    options = ONLY["lora"] | {"lora_dropout": 0.5}
    config = tiny(params_dtype="float64", tensor_model_parallel_size=2, micro_batch_size=16, **options)
    first, second = pool.run(figures_with_dropout, 2, config)
    assert first[:2] == second[:2]
    assert first[1][0] == first[1][1]
    for name, weight in first[2].items():
        assert torch.equal(weight, second[2][name]), name
    (alone,) = pool.run(figures_with_dropout, 1, tiny(params_dtype="float64", micro_batch_size=16, **options))
    (without,) = pool.run(
        figures_with_dropout, 1, tiny(params_dtype="float64", micro_batch_size=16, **(options | {"lora_dropout": 0.0}))
    )
    assert alone[0][1:] != without[0][1:]  # at the first step adapters are zero
    recomputed = tiny(params_dtype="float64", micro_batch_size=16, recompute_granularity="full", **options)
    assert pool.run(figures_with_dropout, 1, recomputed)[0][:2] == alone[:2]


def bytes_held(config: Any) -> dict[str, int]:
    """Of gradients just before the update, and of optimizer states, on this rank."""
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    held = {}
    update = engine.optimizer.update

    def look(*arguments: Any) -> Any:
        held["gradients"] = sum(p.grad.to_local().nbytes for p in engine.parameters.values() if p.grad is not None)
        return update(*arguments)

    engine.optimizer.update = look  # type: ignore[method-assign]
    engine.train_step(share(global_batch(config, 0), grid, config.batch.micro_batch_size), LR)
    states = engine.optimizer.local_states.values()
    held["moments"] = sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in states)
    held["parameters"] = sum(p.to_local().nbytes for p in engine.parameters.values())
    return held


@pytest.mark.parametrize("zero", sweep(range(4), {0, 3}))
def test_frozen_weights_have_neither_gradients_nor_moments(pool: Pool, zero: int) -> None:
    """A pipeline of three, of which the middle stage has nothing to train; old rows have no moments either."""
    options = ONLY["new rows"] | {"pipeline_model_parallel_size": 3, "zero_stage": zero, "micro_batch_size": 2}
    held = pool.run_fake(bytes_held, 6, tiny(pipeline_layers=(1, 2, 1), **options), ranks=range(6))
    matrix, new = 4 * 96 * 32, 4 * (96 - BASE) * 32
    share_of = 1 if zero == 0 else 2
    for stage in (held[0:2], held[4:6]):
        assert sum(rank["gradients"] for rank in stage) == matrix * 2 / share_of
        assert sum(rank["moments"] for rank in stage) == 2 * new * 2 / share_of
    for rank in held[2:4]:
        assert rank["gradients"] == rank["moments"] == 0
        assert rank["parameters"] > 0


def shapes(**options: Any) -> tuple[TrainableConfig, dict[str, torch.Size]]:
    config = tiny(**options)
    return config.trainable, parameter_shapes(config.model, config.adapters)


@pytest.mark.parametrize("only", ONLY)
def test_every_parameter_is_listed_once_as_trained_or_frozen(only: str) -> None:
    trainable, all_shapes = shapes(**ONLY[only])
    selections = select(trainable, all_shapes)
    assert sum(s.count for s in selections) == len(all_shapes)
    assert sum(s.trained + s.frozen for s in selections) == sum(shape.numel() for shape in all_shapes.values())
    expected = sum(
        shape[1:].numel() * (shape[0] - trainable.first_row(name))
        for name, shape in all_shapes.items()
        if trainable.trains(name)
    )
    assert sum(s.trained for s in selections) == expected > 0


def test_the_list_says_what_is_trainable_and_how_much() -> None:
    trainable, all_shapes = shapes(**ONLY["new rows"])
    lines = describe(select(trainable, all_shapes))
    assert lines[0].split() == ["embed_tokens.weight", "1,120", "trainable", "from", "row", "61", "(96", "x", "32)"]
    assert lines[1].split() == ["layers.0-3.input_layernorm.weight", "128", "frozen", "(32,", "4", "times)"]
    assert lines[-1] == "2,240 of 41,248 parameters are trainable (5.43%), 39,008 frozen"
    assert describe(select(TrainableConfig(), all_shapes)) == []


def test_layers_of_one_fate_share_a_line() -> None:
    trainable, all_shapes = shapes(num_layers=7, train_only="layers.[236].mlp.up_proj.weight")
    lines = {s.name: s for s in select(trainable, all_shapes) if "up_proj" in s.name}
    assert set(lines) == {"layers.2-3,6.mlp.up_proj.weight", "layers.0-1,4-5.mlp.up_proj.weight"}
    assert lines["layers.2-3,6.mlp.up_proj.weight"].frozen == lines["layers.0-1,4-5.mlp.up_proj.weight"].trained == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_only": "embedding"}, "no parameter has such a name; give one of embeddings, new-rows, lora"),
        ({"train_only": "layers.*,embed"}, "--train-only embed: no parameter has such a name"),
        ({"train_only": "new-rows"}, "needs --base-vocab-size"),
        ({"train_only": "new-rows", "base_vocab_size": 96}, "--base-vocab-size 96: must be from 1 to 95"),
        ({"train_only": "embeddings", "base_vocab_size": 9}, "--base-vocab-size 9 has no effect without --train-only"),
        ({"train_output_embeddings": True}, "no effect without --train-only embeddings or new-rows"),
        (ONLY["embeddings"] | TIED, "--train-output-embeddings has no effect on a tied model"),
        ({"lora_rank": 4}, "--lora-rank 4 has no effect without --train-only lora"),
        ({"train_only": "lora", "lora_rank": 0}, "--lora-rank 0: must be at least 1"),
        ({"train_only": "lora", "lora_dropout": 1.0}, "--lora-dropout 1.0: must be in"),
        ({"train_only": "lora", "lora_target_modules": ("query",)}, "--lora-target-modules query: give some of q_proj"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        tiny(**options).validate(1)
    assert message in str(error.value)
